"""The container of a partition: its key, and the words that start a command in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

FORM = '"apptainer:/path/image.sif" or "pyxis:image"'
BIND_FORM = '"/folder", "/folder:/inside" or "/folder:/inside:ro"'
_BIND = re.compile(r"(/[^:,]*)(?::(/[^:,]*))?(?::(ro|rw))?")
# An absolute path, or for pyxis an image of a registry in enroot's form, such as nvcr.io#nvidia/pytorch:24.01-py3.
_IMAGES = {"apptainer": re.compile(r"/.+"), "pyxis": re.compile(r"/.+|[A-Za-z0-9][^\s,]*")}


@dataclass(frozen=True)
class Container:
    """An image, and what starts it: `kind` is "apptainer" or "pyxis". `image` is an absolute path, for pyxis also an image of a
    registry."""

    kind: str
    image: str

    @property
    def path(self) -> Path | None:
        """The image's file or folder; None in a registry."""
        return Path(self.image) if self.image.startswith("/") else None

    def words(self, program: Sequence[str], folders: Iterable[Path], binds: Iterable[str], *, gpus: bool) -> list[str]:
        """The command that runs `program` in the container. It sees the `folders` at their own paths, and the `binds`, which have
        the form of `is_bind`. container.sh of the worker adds one more bind to the words of --bind and --container-mounts."""
        bound = [_parts(bind) for bind in [*binds, *_outermost(folders)]]
        if self.kind == "apptainer":
            bind = ",".join(
                dict.fromkeys(
                    inside if (inside, mode) == (folder, "") else _joined(folder, inside, mode)
                    for folder, inside, mode in bound
                )
            )
            return ["apptainer", "exec", *(["--nv"] if gpus else []), f"--bind={bind}", self.image, *program]
        mounts = ",".join(dict.fromkeys(_joined(*parts) for parts in bound))
        # --overlap: a reserved shell already holds the job's resources. srun would bind the worker to one processor.
        return [
            "srun", "--ntasks=1", "--overlap", "--cpu-bind=none", f"--container-image={self.image}",
            f"--container-mounts={mounts}", "--no-container-entrypoint", *program,
        ]  # fmt: skip


def parsed(key: str) -> Container | None:
    """The container of the key `container`; None for another form than FORM."""
    kind, _, image = key.partition(":")
    form = _IMAGES.get(kind)
    return Container(kind, image) if form is not None and form.fullmatch(image) else None


def is_bind(text: str) -> bool:
    """Whether it has a form of BIND_FORM. ":" and "," separate the parts and the binds in both programs."""
    match = _BIND.fullmatch(text)
    return match is not None and (match[3] is None or match[2] is not None)


def _parts(bind: str) -> tuple[str, str, str]:
    """The folder, its path inside, and "", "ro" or "rw"."""
    folder, _, rest = bind.partition(":")
    inside, _, mode = rest.partition(":")
    return folder, inside or folder, mode


def _joined(folder: str, inside: str, mode: str) -> str:
    return ":".join(filter(None, (folder, inside, mode)))


def _outermost(folders: Iterable[Path]) -> list[str]:
    """Each folder that is not below another one of them."""
    distinct = list(dict.fromkeys(folders))
    return [str(one) for one in distinct if not any(other in one.parents for other in distinct)]
