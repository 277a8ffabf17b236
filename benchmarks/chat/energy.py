"""Energy of GPUs, from their own counters: the whole card, without the host."""

import asyncio
import contextlib
import importlib
import os
import time
from types import ModuleType
from typing import Any

IDLE_SECONDS = 5.0


class Meter:
    """The GPUs in use. Raises RuntimeError if there is none, or if they have no energy counters."""

    def __init__(self, gpus: int = 0):
        """The first `gpus` of CUDA_VISIBLE_DEVICES, or of the machine; 0: all of them."""
        nvml = _nvml()
        self.idle_watts = 0.0
        self._nvml: Any = nvml
        try:
            nvml.nvmlInit()
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            names = visible or [str(number) for number in range(nvml.nvmlDeviceGetCount())]
            used = names[: gpus or len(names)]
            self._gpus = [
                nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)
                for name in used
            ]
            self.names = [str(nvml.nvmlDeviceGetName(gpu)) for gpu in self._gpus]
            self.joules()
        except nvml.NVMLError as error:
            raise RuntimeError(f"no counters of GPUs: {error}") from None
        if not self._gpus:
            raise RuntimeError("there is no GPU")

    def joules(self) -> float:
        """Their energy since the driver was loaded."""
        return float(sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in self._gpus)) / 1000

    async def measure_idle(self, seconds: float = IDLE_SECONDS) -> float:
        """Measure the idle power in watts, and set `idle_watts`."""
        before, begun = self.joules(), time.monotonic()
        await asyncio.sleep(seconds)
        self.idle_watts = round((self.joules() - before) / (time.monotonic() - begun), 1)
        return self.idle_watts


def _nvml() -> ModuleType:
    """nvidia-ml-py, or the copy in vLLM."""
    for name in ("pynvml", "vllm.third_party.pynvml"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise RuntimeError("there is neither nvidia-ml-py nor vLLM")
