"""A stand-in for the llama-server program: llama.cpp's own server as xllamacpp embeds it, behind the same options.

Only what stepgguf passes is known; anything else is an error, as it is for llama-server. This build has no RPC backend.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

import xllamacpp


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ctx-size", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--gpu-layers", type=int)
    parser.add_argument("--cache-type-k", default="f16")
    parser.add_argument("--cache-type-v", default="f16")
    parser.add_argument("--flash-attn", choices=["on", "off"])
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--ubatch-size", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--spec-type", choices=["draft-mtp"])
    parser.add_argument("--model-draft")
    parser.add_argument("--rpc")
    parser.add_argument("--no-webui", action="store_true")
    options = parser.parse_args()
    if options.rpc:
        sys.stderr.write('error while handling argument "--rpc": RPC not supported in this build\n')
        return 1
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames = [options.host]
    params.port = options.port
    params.n_ctx = options.ctx_size
    params.n_parallel = options.parallel
    if options.gpu_layers is not None:
        params.n_gpu_layers = options.gpu_layers
    params.cache_type_k = xllamacpp.ggml_type[f"GGML_TYPE_{options.cache_type_k.upper()}"]
    params.cache_type_v = xllamacpp.ggml_type[f"GGML_TYPE_{options.cache_type_v.upper()}"]
    params.n_batch, params.n_ubatch = options.batch_size, options.ubatch_size
    if options.flash_attn:
        how = {"on": "ENABLED", "off": "DISABLED"}[options.flash_attn]
        params.flash_attn_type = xllamacpp.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{how}"]
    params.ui = not options.no_webui
    params.warmup = False
    params.api_keys = [os.environ["LLAMA_API_KEY"]]
    if options.threads:
        params.cpuparams.n_threads = options.threads
    if options.spec_type:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        params.load_mtp = options.model_draft is None
    if options.model_draft:
        params.speculative.draft.mparams.path = options.model_draft
    server = xllamacpp.Server(params)
    sys.stderr.write(f"listening on {server.listening_address}\n")
    signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
