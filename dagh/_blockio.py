"""Block matrices in files: one flat set of arrays and a JSON description, in safetensors or npz."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from dagh._block_base import identity
from dagh._blocks import (
    Block,
    DenseBlock,
    DiagonalBlock,
    GridBlock,
    KroneckerSumBlock,
    LayerPairBlock,
    LowRankBlock,
    SumBlock,
    TransposedBlock,
    ZeroBlock,
)
from dagh._blocktables import Pair
from dagh.errors import DaghError, FileFormatError, first_line

if TYPE_CHECKING:
    from dagh._blockmatrix import BlockMatrix

FORMAT = "dagh.BlockMatrix"
VERSION = 1
_HEADER = "header"

Arrays = dict[str, np.ndarray[Any, Any]]
#: Key of each tensor that was packed, and the tensor, which stays alive as long as its place in memory tells it apart.
Seen = dict[Hashable, tuple[str, Tensor]]

_FACTORED: dict[str, type[Block]] = {
    cls.structure: cls for cls in (DenseBlock, DiagonalBlock, LowRankBlock, KroneckerSumBlock, LayerPairBlock)
}


def save(matrix: BlockMatrix, path: Path) -> None:
    """Write ``matrix``; an interrupted write leaves whatever was at ``path`` untouched."""
    suffix = _suffix(path)
    if not path.parent.is_dir():
        raise FileFormatError(f"cannot write {path}: there is no folder {path.parent}")
    arrays: Arrays = {}
    seen: Seen = {}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "names": matrix.names,
        "shapes": matrix.shapes,
        "modules": matrix.modules,
        "part": matrix.part,
        "reduction": matrix.reduction,
        "samples": matrix.samples,
        "dtype": str(matrix.dtype).removeprefix("torch."),
        "info": matrix.info,
        "blocks": [[i, j, matrix.kinds[i, j], _pack(block, arrays, seen)] for (i, j), block in matrix.blocks.items()],
    }
    text = json.dumps(header, default=str)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if suffix == ".npz":
            with open(partial, "wb") as file:
                np.savez(file, **arrays, **{_HEADER: np.array(text)})  # type: ignore[arg-type]
        else:
            save_file(arrays, partial, metadata={_HEADER: text})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, *, memory_budget: int | None = None) -> BlockMatrix:
    """Read a matrix; ``FileFormatError`` when the file is missing, damaged or something else."""
    from dagh._blockmatrix import BlockMatrix  # which itself saves and loads through this module

    suffix = _suffix(path)
    if not path.is_file():
        raise FileFormatError(f"there is no file {path}")
    try:
        text, arrays = _read_npz(path) if suffix == ".npz" else _read_safetensors(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise FileFormatError(f"{path} is not a readable {suffix} file: {first_line(error)}") from error
    if text is None:
        raise FileFormatError(f"{path} does not hold a block matrix")
    try:
        header = json.loads(text)
        if header["format"] != FORMAT:
            raise FileFormatError(f"{path} does not hold a block matrix")
        if header["version"] != VERSION:
            raise FileFormatError(f"{path} has format version {header['version']}, this reads {VERSION}")
        dtype = {"float32": torch.float32, "float64": torch.float64}[header["dtype"]]
        samples = header["samples"]
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        blocks: dict[Pair, Block] = {}
        kinds: dict[Pair, str] = {}
        for i, j, kind, spec in header["blocks"]:
            blocks[i, j] = _unpack(spec, tensors, samples, dtype)
            kinds[i, j] = kind
            if blocks[i, j].dtype != dtype:
                raise ValueError(f"block ({i}, {j}) is {blocks[i, j].dtype}, the header says {dtype}")
        return BlockMatrix(
            header["names"],
            header["shapes"],
            blocks,
            part=header["part"],
            reduction=header["reduction"],
            samples=samples,
            modules=header["modules"],
            dtype=dtype,
            kinds=kinds,
            info=header["info"],
            memory_budget=memory_budget,
        )
    except FileFormatError:
        raise
    except (DaghError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise FileFormatError(f"{path} is damaged: {first_line(error)}") from error


def _suffix(path: Path) -> str:
    if path.suffix not in (".safetensors", ".npz"):
        raise FileFormatError(f"block matrices are kept in .safetensors or .npz files, not {path.name!r}")
    return path.suffix


def _read_npz(path: Path) -> tuple[str | None, Arrays]:
    opened = np.load(path, allow_pickle=False)
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array")
    with opened as file:
        arrays = {name: file[name] for name in file.files}
    header = arrays.pop(_HEADER, None)
    return (None if header is None else str(header)), arrays


def _read_safetensors(path: Path) -> tuple[str | None, Arrays]:
    with safe_open(path, framework="numpy") as file:
        header = (file.metadata() or {}).get(_HEADER)
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _pack(block: Block, arrays: Arrays, seen: Seen) -> dict[str, Any]:
    """Description of a block, its tensors added to ``arrays`` unless they were ``seen``."""
    if isinstance(block, ZeroBlock):
        return {"structure": "zero", "shape": block.shape}
    if isinstance(block, SumBlock):
        return {"structure": "sum", "terms": [_pack(term, arrays, seen) for term in block.terms]}
    if isinstance(block, GridBlock):
        return {"structure": "grid", "grid": [[_pack(b, arrays, seen) for b in row] for row in block.grid]}
    if isinstance(block, TransposedBlock):
        return {"structure": "transpose", "base": _pack(block.base, arrays, seen)}
    if type(block) not in _FACTORED.values():
        block = DenseBlock(block.dense())
    keys = []
    for tensor in block.tensors():
        key, _ = seen.setdefault(identity(tensor), (f"t{len(arrays)}", tensor))
        if key not in arrays:
            arrays[key] = np.ascontiguousarray(tensor.detach().cpu().numpy())
        keys.append(key)
    return {"structure": block.structure, "tensors": keys}


def _unpack(spec: dict[str, Any], tensors: dict[str, Tensor], samples: int | None, dtype: torch.dtype) -> Block:
    structure = spec["structure"]
    if structure == "zero":
        rows, columns = spec["shape"]
        return ZeroBlock((rows, columns), samples, dtype=dtype)
    if structure == "sum":
        return SumBlock([_unpack(term, tensors, samples, dtype) for term in spec["terms"]])
    if structure == "grid":
        return GridBlock([[_unpack(b, tensors, samples, dtype) for b in row] for row in spec["grid"]])
    if structure == "transpose":
        return TransposedBlock(_unpack(spec["base"], tensors, samples, dtype))
    return _FACTORED[structure](*(tensors[key] for key in spec["tensors"]))  # type: ignore[arg-type]
