"""A save that is killed, at any moment, leaves the checkpoint that was there, or none where there was none."""

import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import qjax

# Saves in forked children, each of which kills itself (SIGKILL: no handler runs) just before its n-th change of the
# file system; the last ones are killed from outside, after a random time. The parent never starts JAX.
DRIVER = """
    import os, random, shutil, signal, sys, time
    import numpy as np
    import orbax.checkpoint
    import qjax
    from tests_tree import tree

    root, changes = sys.argv[1], {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

    def child(work):
        pid = os.fork()
        if pid == 0:
            work()
            os._exit(0)
        return pid

    def status(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def save_until(path, n):
        count = 0
        def step():
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
        def hook(event, args):  # in every thread: folders made, files opened, renamed, removed
            writes = event in changes or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and any(isinstance(a, (str, os.PathLike)) and path in os.fspath(a) for a in args):
                step()
        def profile(frame, event, arg):  # in this thread, which is ours and not Orbax's: what goes into a file
            if event == "c_call" and arg.__name__ == "write":
                step()
        sys.addaudithook(hook)
        sys.setprofile(profile)
        qjax.save(path, tree(2), metadata={"which": "new"}, overwrite=True)

    def start(name, previous):
        path = os.path.join(root, name)
        shutil.copytree(os.path.join(root, "old"), path) if previous else os.mkdir(path)
        return path

    assert status(child(lambda: qjax.save(os.path.join(root, "old"), tree(1), metadata={"which": "old"}))) == 0
    for kind in ("fresh", "over"):
        n = 1
        while True:
            path = start(f"{kind}-{n}", kind == "over")
            code = status(child(lambda: save_until(path, n)))
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
            n += 1
        print(kind, n)
    random.seed(0)
    for i in range(8):
        path = start(f"over-time-{i}", True)
        pid = child(lambda: qjax.save(path, tree(2), metadata={"which": "new"}, overwrite=True))
        time.sleep(random.uniform(0.0, 0.5))
        os.kill(pid, signal.SIGKILL)
        status(pid)
"""

TREE = """
    import numpy as np

    def tree(seed):
        rng = np.random.default_rng(seed)
        return {"w": rng.integers(0, 255, (64, 100 * seed), dtype=np.uint8), "b": rng.standard_normal(5).astype("f4")}
"""


@pytest.fixture(name="killed", scope="module")
def killed_saves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tests_tree.py").write_text(textwrap.dedent(TREE))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert int(counts["fresh"]) > 10 and int(counts["over"]) > int(counts["fresh"])
    namespace = {}
    exec(textwrap.dedent(TREE), namespace)
    return folder, namespace["tree"]


def check(path, tree, seed):
    result = qjax.load(path)
    assert result.metadata == {"which": {1: "old", 2: "new"}[seed]}
    for name, array in tree(seed).items():
        assert np.array_equal(result.params[name], array)


@pytest.mark.slow
def test_a_killed_save_leaves_the_previous_checkpoint_or_the_new_one(killed):
    folder, tree = killed
    outcomes = []
    for path in sorted(folder.glob("over-*")):
        which = qjax.load(path).metadata["which"]
        check(path, tree, {"old": 1, "new": 2}[which])
        outcomes.append(which)
    assert set(outcomes) == {"old", "new"}  # killed before and after the moment it counts


@pytest.mark.slow
def test_a_killed_first_save_leaves_no_checkpoint_or_the_whole_one(killed):
    folder, tree = killed
    found = []
    for path in sorted(folder.glob("fresh-*")):
        if (path / "qjax.json").exists():
            check(path, tree, 2)
            found.append(True)
        else:
            with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
                qjax.load(path)
            found.append(False)
    assert set(found) == {True, False}


@pytest.mark.slow
def test_the_next_save_removes_what_a_killed_one_left(killed, tmp_path):
    folder, tree = killed
    crowded = max(folder.glob("over-*"), key=lambda path: len(os.listdir(path)))
    assert len(os.listdir(crowded)) > 2
    for source in (crowded, max(folder.glob("fresh-*"), key=lambda path: (len(os.listdir(path)), path.name))):
        path = tmp_path / source.name
        shutil.copytree(source, path)
        qjax.save(path, tree(1), metadata={"which": "old"}, overwrite=True)
        check(path, tree, 1)
        assert len(os.listdir(path)) == 2
