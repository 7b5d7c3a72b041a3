"""The variables of a job's environment that may change a measurement, and the secrets that labctl never records."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

REMOVED = "[removed]"
TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16})\b")
# Names of variables that hold secrets; TOKENIZER and MAX_TOKENS do not.
SECRET_NAME = r"\w*(?:(?<!MAX_)TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|KEYS?(?![A-Z0-9]))\w*"  # noqa: S105
SECRET_SET = re.compile(rf"\b({SECRET_NAME})=(?:'[^']*'|\"[^\"]*\"|\S+)", re.IGNORECASE)
_IN_A_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # user:password

# Variables of torch, the engines, NCCL, the linear algebra libraries and the allocators.
ENGINE_PREFIXES = (
    "ATEN_", "BLIS_", "CUBLAS", "CUDA_", "CUDNN_", "DNNL_", "FLASH_ATTENTION", "FLASHINFER_", "GLIBC_TUNABLES", "GOMP_", "HF_",
    "KMP_", "LD_PRELOAD", "MALLOC_", "MKL_", "NCCL_", "NVIDIA_TF32_OVERRIDE", "OMP_", "ONEDNN_", "OPENBLAS_", "PYTORCH_",
    "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_", "VLLM_", "XFORMERS_",
)  # fmt: skip
# Of these, the names of the job's own GPUs, addresses and folders, and settings of downloads, logs and reports. The two of
# KMP are set by `import sklearn`, which a notebook may have done before it submits.
_WITHOUT_EFFECT = re.compile(
    r"CUDA_VISIBLE_DEVICES|NCCL_COMM_ID|NCCL_DEBUG_FILE|VLLM_(HOST_IP|PORT|DP_MASTER_\w+|RPC_\w+|LOGGING_\w+|NO_USAGE_STATS"
    r"|DO_NOT_TRACK)|KMP_(DUPLICATE_LIB_OK|INIT_AT_FORK)|TORCHELASTIC_\w+|HF_(HUB|XET|DATASETS)_\w+|HF_ENDPOINT|TRANSFORMERS_(OFFLINE|VERBOSITY|NO_ADVISORY_WARNINGS)"
    r"|\w+_(CACHE|CACHE_\w+|DIR|DIRECTORY|HOME|PATH|ROOT)"
)
# Paths that change what an engine loads; other paths are only locations.
_PATHS_WITH_EFFECT = re.compile(r"LD_PRELOAD|NCCL_\w+|VLLM_TUNED_CONFIG_FOLDER")


def engine_variables(environment: Mapping[str, str], also: Collection[str] = ()) -> dict[str, str]:
    """The variables that engines read, by name, and those named in `also`.

    Secrets, names of the job's own GPUs and addresses, and paths of caches and installations are left out.
    """
    found = {}
    for name, value in sorted(environment.items()):
        location = value.startswith(("/", "~", "./")) and not _PATHS_WITH_EFFECT.fullmatch(name)
        if (name.startswith(ENGINE_PREFIXES) or name in also) and not (
            location or _WITHOUT_EFFECT.fullmatch(name) or is_secret(name)
        ):
            found[name] = without_secrets(value)
    return found


def is_secret(name: str) -> bool:
    """Whether the name is that of a secret."""
    return re.fullmatch(SECRET_NAME, name, re.IGNORECASE) is not None


def without_secrets(text: str) -> str:
    """The text without tokens, values of variables with a secret's name, and passwords in URLs."""
    return TOKEN.sub(REMOVED, _IN_A_URL.sub(REMOVED, SECRET_SET.sub(rf"\1={REMOVED}", text)))
