"""Which files of a Hugging Face directory hold a model's weights. Reads headers alone. No torch."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from cluster import files
from training.model.shapes import LlamaShape

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")
DTYPES = ("F64", "F32", "F16", "BF16")


def locate(directory: Path, shape: LlamaShape) -> dict[str, Path]:
    """Name -> file of every parameter of `shape`, and of the copy of a tied head if there is one.

    Every tensor must be there, of the right shape, and no other; only the RoPE buffers of old exports are
    passed over.

    Raises:
        ValueError: a file is missing, unreadable, outside the directory or of another format, or a tensor is
            missing, unexpected, mis-shaped or quantised. Names file and tensor.
    """
    expected = shape.parameters()
    allowed = expected | ({"lm_head.weight": expected["model.embed_tokens.weight"]} if shape.tied else {})
    places: dict[str, Path] = {}
    for file in _files(directory):
        for name, (size, dtype) in _header(file).items():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name not in allowed:
                raise ValueError(f"{file}: tensor {name} is unexpected; config.json has no place for it")
            if size != allowed[name]:
                wanted = allowed[name]
                raise ValueError(f"{file}: tensor {name} has shape {size}, config.json asks for {wanted}")
            if dtype not in DTYPES:
                raise ValueError(f"{file}: tensor {name} is {dtype}, not one of {', '.join(DTYPES)}")
            places[name] = file
    for name in expected:
        if name not in places:
            raise ValueError(f"{directory}: tensor {name} is missing from the checkpoint")
    return places


def _files(directory: Path) -> list[Path]:
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
        found = _indexed(index)
    elif single.is_file():
        found = [single]
    else:
        raise ValueError(f"{directory}: neither {SINGLE} nor {INDEX} is here; {_instead(directory)}")
    for file in found:
        if not file.is_file():
            raise ValueError(f"{file}: listed in {INDEX}, but missing; copy the checkpoint again")
    return found


def _instead(directory: Path) -> str:
    """What to do about a directory without safetensors."""
    others = sorted(file.name for file in directory.iterdir() if file.suffix in OTHER_FORMATS)
    if not others:
        return "is it safetensors?"
    return (
        f"{others[0]} is of a format that is not read here (a pickle can run code, GGUF has another layout); "
        "convert the model with transformers: from_pretrained, then save_pretrained"
    )


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of the tensors in a file."""
    try:
        with safe_open(file, framework="np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error}); copy it again") from error


def _indexed(index: Path) -> list[Path]:
    """The files that an index names. Raises `ValueError`: one is not beside it."""
    try:
        names = set(files.read_json(index)["weight_map"].values())
        return [files.inside(index.parent, name) for name in sorted(names)]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: has no weight_map of tensors to file names; copy it again") from error
