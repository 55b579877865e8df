"""The site hook in real Python processes, with simulators for torch and tensorflow that record what is asked of them."""

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
        set_per_process_memory_fraction=lambda fraction, index: print(f"torch {fraction} {index}"),
    )
    backends = types.SimpleNamespace(cuda=types.SimpleNamespace(is_built=lambda: True))
"""

TENSORFLOW = """
    import sys, types
    __version__ = "9.9"

    class Context:
        def _initialize_physical_devices(self):
            print("CUDA begins")

    sys.modules["tensorflow.python.eager.context"] = types.SimpleNamespace(Context=Context)

    def list_physical_devices(kind):
        Context()._initialize_physical_devices()
        return [types.SimpleNamespace(name=f"{kind}:{n}") for n in range(3)]

    config = types.SimpleNamespace(
        list_physical_devices=list_physical_devices,
        LogicalDeviceConfiguration=lambda memory_limit: memory_limit,
        set_logical_device_configuration=lambda gpu, parts: print(f"tensorflow {gpu.name} {parts}"),
        experimental=types.SimpleNamespace(set_memory_growth=lambda gpu, enable: print(f"growth {gpu.name}")),
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
        command = [sys.executable, "-c", textwrap.dedent(program)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def test_torch_is_limited_on_every_gpu_and_not_before_cuda_begins(self):
        self.module("torch/__init__.py", TORCH)
        done = self.python(
            "import torch; print('imported'); [call() for call in torch.queued]", FL_GPU_MEMORY_FRACTION="0.25"
        )
        self.assertEqual(done.stdout.splitlines(), ["imported", "torch 0.25 0", "torch 0.25 1"])
        self.assertIn("supernode-agent: PyTorch 9.9 takes at most 0.25", done.stderr)

    def test_a_limit_that_torch_refuses_is_said_and_cuda_comes_up(self):
        self.module("torch/__init__.py", TORCH)
        done = self.python(
            "import torch; del torch.cuda.set_per_process_memory_fraction; [call() for call in torch.queued]",
            FL_GPU_MEMORY_FRACTION="0.25",
        )
        self.assertIn("could not be applied to torch: AttributeError", done.stderr)

    def test_tensorflow_gets_the_limit_of_each_gpu_when_cuda_begins_and_may_be_told_to_grow(self):
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
        printed = [line for line in done.stdout.splitlines() if line != "CUDA begins"]
        self.assertEqual(printed, ["imported", *limits, "growth GPU:2"])

    def test_a_tensorflow_with_another_inside_gets_its_limits_at_once(self):
        self.module("tensorflow/__init__.py", TENSORFLOW.replace("python.eager", "elsewhere"))
        done = self.python(
            "import tensorflow; print('imported')", FL_GPU_MEMORY_FRACTION="0.5", FL_GPU_MEMORY_LIMITS_MIB="20480"
        )
        self.assertEqual(done.stdout.splitlines(), ["CUDA begins", "tensorflow GPU:0 [20480]", "imported"])

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

    def test_a_program_without_a_framework_pays_less_than_5_ms(self):
        plain = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}  # The container's mount is read-only as well.
        (self.folder / "sitecustomize.py").write_bytes((HERE / "sitecustomize.py").read_bytes())
        hooked = {**plain, "PYTHONPATH": str(self.folder), "FL_GPU_MEMORY_FRACTION": "0.5"}

        def processor_ms(env):
            pid = os.posix_spawn(sys.executable, [sys.executable, "-c", "pass"], env)
            _, status, used = os.wait4(pid, 0)
            self.assertEqual(status, 0)
            return (used.ru_utime + used.ru_stime) * 1000

        pairs = [(processor_ms(plain), processor_ms(hooked)) for _ in range(20)]
        cost = statistics.median(with_hook - without for without, with_hook in pairs)
        start = statistics.median(without for without, _ in pairs)
        print(f"MEASURED: the site hook costs a program without a framework {cost:.2f} ms of processor time, where Python's "
              f"start costs {start:.1f} ms (median of 20 pairs)", file=sys.stderr)
        self.assertLess(cost, 5)


if __name__ == "__main__":
    unittest.main()
