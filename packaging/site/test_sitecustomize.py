"""Runs the site hook in real Python processes with simulated torch and tensorflow modules."""

import os
import pathlib
import statistics
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
        set_per_process_memory_fraction=lambda *arguments: print("torch", *arguments),
    )
    backends = types.SimpleNamespace(cuda=types.SimpleNamespace(is_built=lambda: True))
"""

TENSORFLOW = """
    import sys, types
    __version__ = "9.9"

    class Context:
        def _initialize_physical_devices(self):
            print("CUDA initialises")

    sys.modules["tensorflow.python.eager.context"] = types.SimpleNamespace(Context=Context)

    def list_physical_devices(kind):
        Context()._initialize_physical_devices()
        return [types.SimpleNamespace(name=f"{kind}:{n}") for n in range(3)]

    config = types.SimpleNamespace(
        list_physical_devices=list_physical_devices,
        LogicalDeviceConfiguration=lambda memory_limit: memory_limit,
        set_logical_device_configuration=lambda gpu, parts: print("tensorflow", gpu.name, parts),
        experimental=types.SimpleNamespace(
            set_memory_growth=lambda gpu, enable: print("growth", gpu.name)
        ),
    )
"""


class Hook(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)

    def module(self, name, text):
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def python(self, program, **env):
        paths = f"{HERE}{os.pathsep}{self.directory}"
        env = {"PYTHONPATH": paths, "PATH": os.environ["PATH"], **env}
        command = [sys.executable, "-c", textwrap.dedent(program)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def test_torch_limits_every_gpu_when_cuda_initialises(self):
        self.module("torch/__init__.py", TORCH)
        done = self.python(
            "import torch; print('imported'); [call() for call in torch.queued]",
            FL_GPU_MEMORY_FRACTION="0.25",
        )
        self.assertEqual(done.stdout.splitlines(), ["imported", "torch 0.25 0", "torch 0.25 1"])
        self.assertIn("supernode-agent: PyTorch 9.9: limited to 0.25", done.stderr)

    def test_failed_limit_is_logged_and_cuda_initialises(self):
        self.module("torch/__init__.py", TORCH)
        done = self.python(
            """
            import torch
            del torch.cuda.set_per_process_memory_fraction
            [call() for call in torch.queued]
            """,
            FL_GPU_MEMORY_FRACTION="0.25",
        )
        self.assertIn("cannot apply FL_GPU_MEMORY_FRACTION to torch: AttributeError", done.stderr)

    def test_tensorflow_limits_each_gpu_and_accepts_growth(self):
        self.module("tensorflow/__init__.py", TENSORFLOW)
        done = self.python(
            """
            from tensorflow import config
            print("imported")
            for gpu in config.list_physical_devices("GPU"):
                config.experimental.set_memory_growth(gpu, True)
            """,
            FL_GPU_MEMORY_FRACTION="0.5",
            FL_GPU_MEMORY_LIMITS_MIB="20480,11517",
        )
        limits = ["tensorflow GPU:0 [20480]", "tensorflow GPU:1 [11517]"]
        printed = [line for line in done.stdout.splitlines() if line != "CUDA initialises"]
        self.assertEqual(printed, ["imported", *limits, "growth GPU:2"])

    def test_unknown_tensorflow_internals_limit_at_import(self):
        self.module("tensorflow/__init__.py", TENSORFLOW.replace("python.eager", "elsewhere"))
        done = self.python(
            "import tensorflow; print('imported')",
            FL_GPU_MEMORY_FRACTION="0.5",
            FL_GPU_MEMORY_LIMITS_MIB="20480",
        )
        printed = done.stdout.splitlines()
        self.assertEqual(printed, ["CUDA initialises", "tensorflow GPU:0 [20480]", "imported"])

    def test_submodule_import_limits_once(self):
        self.module("torch/__init__.py", TORCH)
        self.module("torch/nn.py", "")
        program = "import torch.nn, torch; print(len(torch.queued))"
        done = self.python(program, FL_GPU_MEMORY_FRACTION="1")
        self.assertEqual(done.stdout.splitlines(), ["1"])

    def test_invalid_fraction_changes_nothing(self):
        self.module("torch/__init__.py", TORCH)
        for fraction in ("", "x", "0", "2"):
            done = self.python("import torch; print(torch.queued)", FL_GPU_MEMORY_FRACTION=fraction)
            self.assertEqual((done.stdout, done.stderr), ("[]\n", ""))

    def test_program_without_framework_logs_nothing(self):
        done = self.python("print('hello')", FL_GPU_MEMORY_FRACTION="0.5")
        self.assertEqual((done.stdout, done.stderr), ("hello\n", ""))

    def test_missing_framework_raises_as_usual(self):
        program = "try: import torch\nexcept ModuleNotFoundError as e: print(e.name)"
        done = self.python(program, FL_GPU_MEMORY_FRACTION="1")
        self.assertEqual(done.stdout, "torch\n")

    def test_failure_is_logged_and_program_runs(self):
        self.module("torch/__init__.py", "__version__ = '9.9'")
        done = self.python("import torch; print('runs')", FL_GPU_MEMORY_FRACTION="0.5")
        self.assertEqual(done.stdout, "runs\n")
        self.assertIn("cannot apply FL_GPU_MEMORY_FRACTION to torch", done.stderr)

    def test_sitecustomize_of_the_image_runs(self):
        self.module("sitecustomize.py", "print('the image')")
        self.assertEqual(self.python("pass").stdout, "the image\n")

    def test_cost_without_framework_is_below_5_ms(self):
        # No bytecode: the mount in the container is read-only.
        plain = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
        hook = (HERE / "sitecustomize.py").read_bytes()
        (self.directory / "sitecustomize.py").write_bytes(hook)
        hooked = {**plain, "PYTHONPATH": str(self.directory), "FL_GPU_MEMORY_FRACTION": "0.5"}

        def processor_ms(env):
            pid = os.posix_spawn(sys.executable, [sys.executable, "-c", "pass"], env)
            _, status, used = os.wait4(pid, 0)
            self.assertEqual(status, 0)
            return (used.ru_utime + used.ru_stime) * 1000

        pairs = [(processor_ms(plain), processor_ms(hooked)) for _ in range(20)]
        cost = statistics.median(with_hook - without for without, with_hook in pairs)
        start = statistics.median(without for without, _ in pairs)
        print(
            f"MEASURED: CPU time of the site hook without a framework: {cost:.2f} ms;"
            f" start of Python: {start:.1f} ms (median of 20 pairs)",
            file=sys.stderr,
        )
        self.assertLess(cost, 5)


if __name__ == "__main__":
    unittest.main()
