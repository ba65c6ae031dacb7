"""A clock for compilation, and gptqmodel on the shipped model: shared by the benchmarks that compare with it."""

import time

import jax
import numpy as np

from qjax.models import books_llama_folder


class CompileClock:
    """Sums the seconds that jax spends tracing, lowering and compiling, or on the events whose name begins with `events`."""

    def __init__(self, events="/jax/core/compile/"):
        self.seconds, self.events = 0.0, events
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **_):
        if event.startswith(self.events):
            self.seconds += duration

    def read(self):
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Peer:
    """gptqmodel's solver on the same model in torch: Hessian hooks on each group of layers, and two forward passes."""

    GROUPS = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )

    def __init__(self, tokens):
        import torch
        from transformers import LlamaForCausalLM

        self.torch, self.tokens = torch, torch.tensor(np.asarray(tokens), dtype=torch.long)
        self.load = lambda: LlamaForCausalLM.from_pretrained(str(books_llama_folder()), dtype=torch.float32).eval()

    def run(self, bits):
        """Returns seconds in (forward pass, Hessian updates, solver) as gptqmodel's own loop spends them."""
        import contextlib
        import io

        from gptqmodel.quantization import GPTQ, QuantizeConfig

        torch = self.torch
        model = self.load()
        config = QuantizeConfig(bits=bits, group_size=128, desc_act=False, damp_percent=0.01)
        linear = dict(model.named_modules())
        names = [f"model.layers.{i}.{n}" for i in range(len(model.model.layers)) for group in self.GROUPS for n in group]
        inputs = {}
        hooks = [
            linear[name].register_forward_hook(lambda _, x, y, name=name: inputs.setdefault(name, []).append((x[0], y))) for name in names
        ]
        with torch.no_grad():
            start = time.perf_counter()
            for chunk in self.tokens.split(8):
                model(chunk)
            forward = time.perf_counter() - start
            for hook in hooks:
                hook.remove()
            hessian = solver = 0.0
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                for name in names:
                    task = GPTQ(linear[name], config)
                    task.quantizer.configure(perchannel=True)
                    start = time.perf_counter()
                    for x, y in inputs.pop(name):
                        task.add_batch(x, y)
                    middle = time.perf_counter()
                    task.quantize()
                    hessian, solver = hessian + middle - start, solver + time.perf_counter() - middle
        return {"forward": forward, "hessian": hessian, "solver": solver, "total": 2 * forward + hessian + solver}
