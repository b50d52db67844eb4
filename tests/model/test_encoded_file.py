# SPDX-License-Identifier: Apache-2.0
"""Encoded models as files: a round trip of everything, and every damage is one clear error."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from speq.model.checkpoint import Model, linear_names
from speq.model.encoded_file import EncodedModel, read_encoded, sha256, write_encoded
from speq.model.encoding import tensors_for
from speq.model.number_format import FormatConfig
from speq.model.speculation import Settings
from tests.model.drafted import drafted_model, randomly_scaled

SEED = int(os.environ.get("SPEQ_SEED", "0"))
SETTINGS = {"chain": Settings(6, 3, 0.5, 1), "alternates": Settings(8, None, 1.25, 4)}
REPORT = {"tried": [{"cost": 0.25, "alternates": 1.5}], "note": "ä"}
PARTS = ("draft", "residual", "groups")
PLANES = ("draft_plane", "residual_plane", "group_bytes")


@pytest.fixture(scope="module")
def model() -> Model:
    print(f"SPEQ_SEED={SEED}")
    return drafted_model("llama", SEED)


@pytest.fixture(scope="module")
def encoded(model) -> EncodedModel:
    """With scale codes of all sorts, and a head of 40 outputs."""
    tensors = randomly_scaled(
        model, np.random.default_rng(SEED), FormatConfig(32, 3), drafted_outputs=40
    )
    digests = {name: sha256(model.linear_weight(name)) for name in tensors}
    return EncodedModel("some model", tensors, digests, SETTINGS, REPORT)


@pytest.fixture
def path(encoded, tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    write_encoded(path, encoded)
    return path


def digest(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(contents)).hexdigest()


def sign(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Give a changed file the digests that belong to it, as the module documents them."""
    entries = header.get("tensors")
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        parts = (arrays.get(f"{name}.{part}") for part in PARTS)
        entry["planes"] = digest(*(part.tobytes() for part in parts if part is not None))
    header.pop("sha256", None)
    header["sha256"] = digest(json.dumps(header).encode())


def change(
    path: Path,
    edit: Callable[[dict[str, Any], dict[str, np.ndarray]], object],
    signed: bool = True,
) -> None:
    """Write the file again after edit(header, arrays), with digests of its own or as damage."""
    arrays = {name: array.copy() for name, array in load_file(path).items()}
    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["speq"])
    edit(header, arrays)
    if signed:
        sign(header, arrays)
    save_file(arrays, path, {"speq": json.dumps(header)})


def test_everything_comes_back(model, encoded, path):
    read = read_encoded(path)
    assert (read.source, read.digests) == (encoded.source, encoded.digests)
    assert (read.settings, read.report) == (SETTINGS, REPORT)
    assert list(read.tensors) == list(encoded.tensors) == linear_names(model.config)
    for name, tensor in read.tensors.items():
        expected = encoded.tensors[name]
        for field in ("name", "shape", "config", "columns", "drafted_outputs"):
            assert getattr(tensor, field) == getattr(expected, field), (name, field)
        for plane in PLANES:
            ours, theirs = getattr(tensor, plane), getattr(expected, plane)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
        weights = model.linear_weight(name)
        assert torch.equal(tensor.decode().view(torch.int16), weights.view(torch.int16))
    assert read.tensors["head"].drafted_outputs == 40
    read.check_bits()
    read.check_source(model)


def test_a_file_without_calibration_has_no_settings(encoded, tmp_path):
    name = "block.0.q_proj"
    tensors, digests = ({name: some[name]} for some in (encoded.tensors, encoded.digests))
    write_encoded(tmp_path / "x", EncodedModel("m", tensors, digests))
    read = read_encoded(tmp_path / "x")
    assert (read.settings, read.report, list(read.tensors)) == ({}, {}, [name])


def test_documented_layout(encoded, path):
    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["speq"])
    assert header["version"] == 5 and header["columns"] == 16
    keys = {"version", "source", "columns", "tensors", "settings", "report", "sha256"}
    assert set(header) == keys
    entry = header["tensors"]["head"]
    assert entry["shape"] == [64, 32] and entry["drafted_outputs"] == 40
    assert entry["format"] == {"group": 32, "split": 3}
    assert entry["sha256"] == encoded.digests["head"]
    names = {f"head.{part}" for part in ("draft", "residual", "groups")}
    assert {name for name in arrays if name.startswith("head.")} == names
    stored = json.loads(json.dumps(header))
    sign(stored, arrays)
    assert stored == header  # the digests are the documented ones


def test_digest_is_of_little_endian_rows():
    weights = torch.tensor([[1.0, 2.0], [-0.0, 0.5]]).half()
    expected = hashlib.sha256(bytes.fromhex("003c 0040 0080 0038")).hexdigest()
    assert sha256(weights) == expected
    assert sha256(weights.T.contiguous().T) == expected
    assert sha256(-weights) != expected


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_files_are_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is no intact encoded model") as caught:
        read_encoded(path)
    assert str(path) in str(caught.value)


def head(header: dict) -> dict:
    return header["tensors"]["head"]


DAMAGE = {
    "version": lambda h, a: h.update(version=1),
    "no version": lambda h, a: h.pop("version"),
    "no tensors": lambda h, a: h.update(tensors={}),
    "tensors of another type": lambda h, a: h.update(tensors=["head"]),
    "columns 0": lambda h, a: h.update(columns=0),
    "other columns": lambda h, a: h.update(columns=8),
    "columns as text": lambda h, a: h.update(columns="16"),
    "fraction of a column": lambda h, a: h.update(columns=16.0),
    "source of another type": lambda h, a: h.update(source=5),
    "no source": lambda h, a: h.pop("source"),
    "shape": lambda h, a: head(h).update(shape=[64, 999]),
    "negative shape": lambda h, a: head(h).update(shape=[-64, 32]),
    "three dimensions": lambda h, a: head(h).update(shape=[64, 32, 1]),
    "fractions in the shape": lambda h, a: head(h).update(shape=[64.0, 32]),
    "shape with the same tiles": lambda h, a: head(h).update(shape=[10**400, 32]),
    "width": lambda h, a: head(h)["format"].update(width=4),
    "impossible split": lambda h, a: head(h)["format"].update(split=9),
    "unknown format field": lambda h, a: head(h)["format"].update(block=9),
    "no format": lambda h, a: head(h).pop("format"),
    "drafted outputs": lambda h, a: head(h).update(drafted_outputs=65),
    "no drafted outputs": lambda h, a: head(h).update(drafted_outputs=0),
    "fraction of a drafted output": lambda h, a: head(h).update(drafted_outputs=1.5),
    "no digest": lambda h, a: head(h).pop("sha256"),
    "plane missing": lambda h, a: a.pop("head.draft"),
    "plane of another type": lambda h, a: a.update({"head.groups": a["head.groups"].astype("u2")}),
    "impossible settings": lambda h, a: h["settings"]["alternates"].update(draft_length=9),
    "settings of another type": lambda h, a: h["settings"]["alternates"].update(rows="8"),
    "fraction of a row": lambda h, a: h["settings"]["alternates"].update(rows=8.5),
    "rows as a truth value": lambda h, a: h["settings"]["alternates"].update(rows=True),
    "no rows": lambda h, a: h["settings"]["alternates"].update(rows=None),
    "infinite threshold": lambda h, a: h["settings"]["chain"].update(threshold=math.inf),
    "threshold is not a number": lambda h, a: h["settings"]["chain"].update(threshold=math.nan),
    "one setting": lambda h, a: h["settings"]["chain"].pop("threshold"),
    "settings of one kind": lambda h, a: h["settings"].pop("chain"),
    "no settings": lambda h, a: h.pop("settings"),
    "no report": lambda h, a: h.pop("report"),
    "unknown setting": lambda h, a: h["settings"]["alternates"].update(speed=9),
    "settings as a list": lambda h, a: h.update(settings=[]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_headers_and_arrays_are_refused(path, damage):
    change(path, DAMAGE[damage])
    with pytest.raises(ValueError, match="is no intact encoded model") as caught:
        read_encoded(path)
    message = str(caught.value)
    assert str(path) in message and len(message) < 600
    assert "digest" not in message or "no digest" in damage  # but for what is wrong itself
    if damage == "version":
        assert "version is 1, expected 5: encode it again" in message


@pytest.mark.parametrize(
    "metadata", [None, {"other": "x"}, {"speq": "{"}, {"speq": "[]"}, {"speq": "[" * 10**5}]
)
def test_foreign_files_are_refused(path, metadata):
    save_file({"head.draft": np.zeros(3, np.uint16)}, path, metadata)
    with pytest.raises(ValueError, match="is no intact encoded model"):
        read_encoded(path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"absent\.safetensors"):
        read_encoded(tmp_path / "absent.safetensors")
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        read_encoded(tmp_path)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bit", range(8))
def test_one_flipped_bit_is_found(path, part, bit):
    """Of any array, also where it decodes to the same weights: a scale code changes drafts only."""

    def flip(header: dict, arrays: dict[str, np.ndarray]) -> None:
        arrays[f"head.{part}"].reshape(-1).view(np.uint8)[13] ^= 1 << bit

    change(path, flip, signed=False)
    with pytest.raises(ValueError, match="the arrays of head differ from their digest"):
        read_encoded(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda h, a: h["settings"]["chain"].update(threshold=0.75),
        lambda h, a: head(h).update(drafted_outputs=41),
        lambda h, a: head(h).update(sha256="0" * 64),
        lambda h, a: h.update(source="another model"),
        lambda h, a: h["report"].update(note="a"),
        lambda h, a: h.update(sha256="0" * 64),
    ],
)
def test_a_changed_header_is_found(path, edit):
    change(path, edit, signed=False)
    with pytest.raises(ValueError, match="its header differs from its digest"):
        read_encoded(path)


@pytest.mark.parametrize("part", ["draft", "residual", "groups"])
@pytest.mark.parametrize("name", ["head", "block.1.k_proj"])
def test_planes_of_other_weights_are_found(model, path, name, part):
    """Whatever their digest says."""

    def flip(header: dict, arrays: dict[str, np.ndarray]) -> None:
        plane = arrays[f"{name}.{part}"]
        # Any bit of the planes; of the group bytes one of the base exponent.
        plane[0, plane.shape[1] // 2, 1] ^= 1 << (3 if part == "groups" else 9)

    change(path, flip)
    read = read_encoded(path)
    read.check_source(model)
    with pytest.raises(ValueError, match=f"{name} does not decode to its original bits"):
        read.check_bits()
    with pytest.raises(ValueError, match=f"{path}: {name} does not decode"):
        tensors_for(model, read, path)


def test_another_model_is_told_apart(path):
    read = read_encoded(path)
    with pytest.raises(ValueError, match=r"not of random llama: block\.0\.q_proj differs"):
        read.check_source(drafted_model("llama", SEED + 1))
    small = SimpleNamespace(name="small", config=SimpleNamespace(blocks=0))
    with pytest.raises(ValueError, match=r"not of small: block\.0\.q_proj differs"):
        read.check_source(small)
    other = drafted_model("llama", SEED)
    other.weights["head"][63, 31] *= -1
    with pytest.raises(ValueError, match="head differs"):
        read.check_source(other)
