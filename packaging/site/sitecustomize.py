"""Applies FL_GPU_MEMORY_FRACTION to PyTorch and TensorFlow in an unmodified ClientApp.

supernode-agent mounts this directory into the container and adds it to PYTHONPATH. Python imports
`sitecustomize` at every start. The hook then waits for the first import of a framework, and after
that until the framework itself initialises the GPUs, because a process that forks after CUDA is
initialised cannot use it in its children. The limit is soft: CUDA's context (some hundred MiB) is
not included.
"""

import os
import sys
from importlib.machinery import PathFinder

_DIRECTORY = os.path.dirname(os.path.abspath(__file__))


def _log(text):
    print(f"supernode-agent: {text}", file=sys.stderr, flush=True)


def _attempt(name, step, *arguments):
    """Logs an error of a step instead of raising it: the ClientApp must run."""
    try:
        step(*arguments)
    except Exception as error:
        _log(f"cannot apply FL_GPU_MEMORY_FRACTION to {name}: {error!r}")


def _limit_torch(torch, fraction):
    def limit():
        count = torch.cuda.device_count()
        for index in range(count):
            torch.cuda.set_per_process_memory_fraction(fraction, index)
        _log(
            f"PyTorch {torch.__version__}: limited to {fraction:g} of the memory of each GPU"
            f" ({count} GPUs)"
        )

    # Runs when CUDA is initialised, or now if it is. An exception would prevent the initialisation.
    torch.cuda._lazy_call(lambda: _attempt("torch", limit))
    if not torch.backends.cuda.is_built():
        _log(f"PyTorch {torch.__version__}: built without CUDA; it cannot use the GPU")


def _limit_tensorflow(tensorflow, _fraction):
    text = os.environ.get("FL_GPU_MEMORY_LIMITS_MIB", "")
    limits = [int(part) for part in text.split(",") if part]
    config = tensorflow.config
    limited = []

    def limit():
        gpus = config.list_physical_devices("GPU")
        for gpu, mib in zip(gpus, limits):
            if mib > 0:
                logical = config.LogicalDeviceConfiguration(memory_limit=mib)
                config.set_logical_device_configuration(gpu, [logical])
                limited.append(gpu)
                _log(f"TensorFlow {tensorflow.__version__}: limited to {mib} MiB of {gpu.name}")
        if not gpus:
            _log(f"TensorFlow {tensorflow.__version__}: no GPU found")

    # A GPU with a limit rejects `set_memory_growth`, which many ClientApps call. Memory grows on
    # demand anyway: the agent sets TF_FORCE_GPU_ALLOW_GROWTH.
    set_memory_growth = config.experimental.set_memory_growth

    def set_memory_growth_if_unlimited(device, enable):
        config.list_physical_devices("GPU")  # Applies the limits if they are not yet.
        if device not in limited:
            set_memory_growth(device, enable)

    config.experimental.set_memory_growth = set_memory_growth_if_unlimited

    # TensorFlow lists its devices before it uses one; listing initialises CUDA.
    context = getattr(sys.modules.get("tensorflow.python.eager.context"), "Context", None)
    list_devices = getattr(context, "_initialize_physical_devices", None)
    if list_devices is None:  # Another internal structure: apply the limits now rather than never.
        limit()
        return

    def list_devices_and_limit(self, *arguments, **keywords):
        context._initialize_physical_devices = list_devices
        list_devices(self, *arguments, **keywords)
        _attempt("tensorflow", limit)

    context._initialize_physical_devices = list_devices_and_limit


class _ImportHook:
    """A finder that delegates to the other finders and adds a step after a framework's import."""

    steps = {"torch": _limit_torch, "tensorflow": _limit_tensorflow}

    def __init__(self, fraction):
        self.fraction = fraction

    def find_spec(self, name, path=None, target=None):
        step = self.steps.get(name)
        if step is None or path is not None:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is not None and hasattr(spec.loader, "exec_module"):
            self._extend(spec.loader, step)
        return spec

    def _extend(self, loader, step):
        execute = loader.exec_module

        def execute_and_limit(module):
            execute(module)
            _attempt(module.__name__, step, module, self.fraction)

        loader.exec_module = execute_and_limit


def _install():
    text = os.environ.get("FL_GPU_MEMORY_FRACTION", "")
    try:
        fraction = float(text)
    except ValueError:
        return
    if 0 < fraction <= 1:
        sys.meta_path.insert(0, _ImportHook(fraction))


def _run_next_sitecustomize():
    """Runs the sitecustomize of the image, which this one hides."""
    others = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != _DIRECTORY]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is None or spec.loader is None:
        return
    import importlib.util  # Takes a millisecond, and few images need it.

    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_install()
_run_next_sitecustomize()
