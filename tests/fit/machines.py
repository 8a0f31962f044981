"""Machines of each kind and builds of the engine, as tests describe them."""

from __future__ import annotations

from dataclasses import replace

from stepgguf.files.byte_sizes import GIB
from stepgguf.fit.machine import AmdMemory, Machine
from stepgguf.runtime.llama_build import Gpu, LlamaBuild

LINUX = Machine("Linux", "x86_64", "AMD EPYC", 16, 16, frozenset({"avx2"}), 256 * GIB, 250 * GIB, 0)
SPARK = replace(LINUX, cpu="aarch64", ram=127600748 << 10, ram_available=118566368 << 10,
                gpus=(Gpu("NVIDIA GB10", None, None),))  # fmt: skip
MAC = replace(LINUX, system="Darwin", cpu="Apple M1 Ultra", ram=128 * GIB, ram_available=118 * GIB, wired_limit=0)
STRIX = replace(LINUX, cpu="AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", ram=130966528 << 10, ram_available=121 * GIB,
                amd=AmdMemory(GIB // 2, 63968 << 20))  # fmt: skip
CARD = replace(LINUX, gpus=(Gpu("NVIDIA H100", 80 * GIB, 79 * GIB),))

CPU_BUILD = LlamaBuild("0.3.36", frozenset({"AVX2"}), gpu_offload=False, gpus=(), mtp=True, compiler=("GCC", (12, 2)))
CUDA_BUILD = replace(CPU_BUILD, gpu_offload=True, gpus=(Gpu("NVIDIA", 80 * GIB, 79 * GIB),),
                     backends=frozenset({"cuda"}))  # fmt: skip
