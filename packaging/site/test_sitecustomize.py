"""The site hook in real Python processes, with stand-ins for torch and tensorflow that record what is asked of them."""

import os
import pathlib
import subprocess
import sys
import tempfile
import textwrap
import unittest

HERE = pathlib.Path(__file__).resolve().parent

TORCH = """
    import types
    __version__ = "9.9"
    queued = []
    cuda = types.SimpleNamespace(
        device_count=lambda: 2,
        _lazy_call=queued.append,
        set_per_process_memory_fraction=lambda fraction, index: print(f"torch {fraction} {index}"),
    )
"""

TENSORFLOW = """
    import types
    __version__ = "9.9"
    config = types.SimpleNamespace(
        list_physical_devices=lambda kind: [types.SimpleNamespace(name=f"{kind}:{n}") for n in range(2)],
        LogicalDeviceConfiguration=lambda memory_limit: memory_limit,
        set_logical_device_configuration=lambda gpu, parts: print(f"tensorflow {gpu.name} {parts}"),
    )
"""


class Hook(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def module(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def python(self, program, **env):
        env = {"PYTHONPATH": f"{HERE}{os.pathsep}{self.folder}", "PATH": os.environ["PATH"], **env}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def test_torch_is_limited_on_every_gpu_and_not_before_cuda_begins(self):
        self.module("torch/__init__.py", TORCH)
        done = self.python(
            "import torch; print('imported'); [call() for call in torch.queued]", FL_GPU_MEMORY_FRACTION="0.25"
        )
        self.assertEqual(done.stdout.splitlines(), ["imported", "torch 0.25 0", "torch 0.25 1"])
        self.assertIn("supernode-agent: PyTorch 9.9 will take at most 0.25", done.stderr)

    def test_tensorflow_gets_the_limit_of_each_gpu(self):
        self.module("tensorflow/__init__.py", TENSORFLOW)
        done = self.python(
            "import tensorflow", FL_GPU_MEMORY_FRACTION="0.5", FL_GPU_MEMORY_LIMITS_MIB="20480,11517"
        )
        self.assertEqual(done.stdout.splitlines(), ["tensorflow GPU:0 [20480]", "tensorflow GPU:1 [11517]"])

    def test_a_submodule_first_limits_as_well_and_once(self):
        self.module("torch/__init__.py", TORCH)
        self.module("torch/nn.py", "")
        done = self.python("import torch.nn, torch; print(len(torch.queued))", FL_GPU_MEMORY_FRACTION="1")
        self.assertEqual(done.stdout.splitlines(), ["1"])

    def test_without_a_fraction_nothing_is_changed(self):
        self.module("torch/__init__.py", TORCH)
        for fraction in ("", "x", "0", "2"):
            done = self.python("import torch; print(torch.queued)", FL_GPU_MEMORY_FRACTION=fraction)
            self.assertEqual((done.stdout, done.stderr), ("[]\n", ""))

    def test_a_program_without_a_framework_hears_nothing(self):
        done = self.python("print('hello')", FL_GPU_MEMORY_FRACTION="0.5")
        self.assertEqual((done.stdout, done.stderr), ("hello\n", ""))

    def test_a_framework_that_is_not_there_is_not_there(self):
        done = self.python("try: import torch\nexcept ModuleNotFoundError as e: print(e.name)", FL_GPU_MEMORY_FRACTION="1")
        self.assertEqual(done.stdout, "torch\n")

    def test_what_cannot_be_applied_is_said_and_the_program_goes_on(self):
        self.module("torch/__init__.py", "__version__ = '9.9'")
        done = self.python("import torch; print('goes on')", FL_GPU_MEMORY_FRACTION="0.5")
        self.assertEqual(done.stdout, "goes on\n")
        self.assertIn("could not be applied to torch", done.stderr)

    def test_the_images_own_sitecustomize_runs_as_well(self):
        self.module("sitecustomize.py", "print('the image')")
        self.assertEqual(self.python("pass").stdout, "the image\n")


if __name__ == "__main__":
    unittest.main()
