"""Runs the site hook with real frameworks without a GPU and records the calls into CUDA."""

import os
import pathlib
import subprocess
import sys
import textwrap
import unittest

HERE = pathlib.Path(__file__).resolve().parent


def run(framework, *arguments, **env):
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "FL_"))
    }
    command = [HERE / "with-framework.sh", framework, *arguments]
    return subprocess.run(command, env={**kept, **env}, capture_output=True, text=True, timeout=900)


class RealFramework(unittest.TestCase):
    framework = None

    @classmethod
    def setUpClass(cls):
        done = run(cls.framework, "--version")
        if done.returncode == 0:
            return
        reason = f"no real {cls.framework}: {done.stderr.strip().splitlines()[-1]}"
        if os.environ.get("SUPERNODE_TESTS_REQUIRE_DOCKER") == "1":
            raise AssertionError(reason)
        print(f"SKIPPED: {reason} ({cls.__name__})", file=sys.stderr)
        raise unittest.SkipTest(reason)

    def python(self, program, **env):
        program = textwrap.dedent(program)
        done = run(self.framework, "-c", program, FL_GPU_MEMORY_FRACTION="0.25", **env)
        self.assertEqual(done.returncode, 0, done.stderr)
        logged = [line for line in done.stderr.splitlines() if line.startswith("supernode-agent: ")]
        return done.stdout.splitlines(), logged


class Torch(RealFramework):
    framework = "torch"

    def test_torch_limits_each_gpu_when_cuda_initialises(self):
        printed, logged = self.python(
            """
            import torch
            print(torch.cuda.is_initialized(), float(torch.ones(2).sum()))
            torch._C._cuda_getDeviceCount = torch.cuda.device_count = lambda: 2
            torch._C._cuda_init = lambda: print("CUDA initialises")
            def set_memory_fraction(fraction, index):
                print(f"GPU {index}: {fraction}")
            torch._C._cuda_setMemoryFraction = set_memory_fraction
            torch.cuda._cudart = object()
            torch.cuda.init()
            print(torch.cuda.is_initialized())
            """
        )
        self.assertEqual(
            printed, ["False 2.0", "CUDA initialises", "GPU 0: 0.25", "GPU 1: 0.25", "True"]
        )
        self.assertIn("built without CUDA", logged[0])
        self.assertIn("limited to 0.25 of the memory of each GPU (2 GPUs)", logged[1])


class TensorFlow(RealFramework):
    framework = "tensorflow"

    def test_tensorflow_limits_each_gpu_and_accepts_growth(self):
        printed, logged = self.python(
            """
            import tensorflow
            from tensorflow.python.eager import context
            print("listed at import:", context.context()._physical_devices)
            names = [b"/physical_device:GPU:0", b"/physical_device:GPU:1"]
            context.pywrap_tfe.TF_ListPhysicalDevices = lambda: names
            for gpu in tensorflow.config.list_physical_devices("GPU"):
                tensorflow.config.experimental.set_memory_growth(gpu, True)
            options = context.context().config.gpu_options
            print([list(device.memory_limit_mb) for device in options.experimental.virtual_devices])
            """,
            FL_GPU_MEMORY_LIMITS_MIB="20480,11517",
        )
        self.assertEqual(printed, ["listed at import: None", "[[20480.0], [11517.0]]"])
        self.assertEqual(
            [line.partition(": limited to ")[2] for line in logged],
            ["20480 MiB of /physical_device:GPU:0", "11517 MiB of /physical_device:GPU:1"],
        )

    def test_tensorflow_without_gpu_runs_and_logs_once(self):
        printed, logged = self.python(
            "import tensorflow as tf; print(float(tf.reduce_sum(tf.constant([1.0, 2.0]))))",
            FL_GPU_MEMORY_LIMITS_MIB="20480",
        )
        self.assertEqual(printed, ["3.0"])
        self.assertEqual(len(logged), 1)
        self.assertIn("no GPU found", logged[0])


if __name__ == "__main__":
    unittest.main()
