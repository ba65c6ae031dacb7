"""Makes peft_lora/, peft_dora/ and peft.npz: adapters that Hugging Face PEFT wrote, and what its model computes with them.

  pip install "torch==2.13.0" "transformers" && pip install --no-deps "peft==0.21.2" accelerate && python tests/golden/make_peft.py

A small network: an embedding (7, 6) whose rows are summed up beside a linear layer (5 -> 6), and a convolution (3 -> 4, window 2 x 2).
`lora` has adapters for all three, the linear one of another rank and alpha, rank-stabilized; `dora` for two, not the embedding.
Everything is drawn at random, also B and the magnitudes.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

HERE = Path(__file__).parent


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 6)
        self.up = torch.nn.Linear(5, 6, bias=False)
        self.conv = torch.nn.Conv2d(3, 4, 2, bias=False)

    def forward(self, tokens, x, image):
        return self.embed(tokens).sum(1) + self.up(x), self.conv(image)


def main():
    torch.manual_seed(0)
    net = Net()
    found = {f"weight/{name}": p.detach().numpy().copy() for name, p in net.named_parameters()}
    inputs = {"tokens": torch.tensor([[0, 3, 6], [2, 2, 5]]), "x": torch.randn(2, 5), "image": torch.randn(2, 3, 4, 5)}
    found |= {f"input/{name}": x.numpy() for name, x in inputs.items()}
    configs = {
        "lora": LoraConfig(r=2, lora_alpha=6, use_rslora=True, target_modules=["embed", "up", "conv"], rank_pattern={"up": 3},
                           alpha_pattern={"up": 4}),
        "dora": LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["up", "conv"]),
    }  # fmt: skip
    for name, config in configs.items():
        again = Net()
        again.load_state_dict(net.state_dict())
        model = get_peft_model(again, config)
        with torch.no_grad():
            for path, p in model.named_parameters():
                if "lora_" in path:
                    p += 0.3 * torch.randn_like(p)
            outs = model.eval()(**inputs)
        found |= {f"{name}/{i}": out.numpy() for i, out in enumerate(outs)}
        save(model, HERE / f"peft_{name}")
    np.savez_compressed(HERE / "peft.npz", **found)


def save(model, folder):
    """The two files, the list of modules in an order that does not change."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with tempfile.TemporaryDirectory() as written:
        model.save_pretrained(written)
        shutil.copy(f"{written}/adapter_model.safetensors", folder)
        config = json.loads(Path(written, "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
