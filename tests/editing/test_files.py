"""Edited checkpoints in their own format: edited tensors are the formula's, and everything else is as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from spectra.checkpoints import open_checkpoint
from spectra.editing import Mitigation, Rewinding, Scaling, Truncation, edit, mitigate
from spectra.editing.patching import InFiles, lying_at
from spectra.errors import SpectraError
from spectra.intruding import find_intruders
from tests.reference import edits as reference
from tests.strategies import orthonormal

HIDDEN = 24
CONFIG = {"model_type": "gpt2", "n_embd": HIDDEN, "n_head": 4, "architectures": ["GPT2LMHeadModel"]}


def weight(generator: np.random.Generator, m: int, n: int) -> np.ndarray:
    k = min(m, n)
    s = np.concatenate([np.linspace(3, 2, 4), np.linspace(0.3, 0.2, k - 4)])
    W: np.ndarray = (orthonormal(generator, m, k) * s) @ orthonormal(generator, n, k).T
    return W


def new_direction(W: np.ndarray) -> np.ndarray:
    """A strong product of two unit vectors, even mixtures of W's weak singular vectors: no single one is like them."""
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    weak = slice(4, len(s))
    D: np.ndarray = 2.6 * np.outer(U[:, weak].sum(1), Vt[weak].sum(0)) / (len(s) - 4)
    return D


def models(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base and a tuned model with a strong new direction in every matrix: plain, fused, Conv1D, stacked, kernel."""
    generator = np.random.default_rng(0)
    shapes = {
        "h.0.attn.c_attn.weight": (HIDDEN, 3 * HIDDEN),  # Conv1D: in x out, fused q | k | v
        "h.0.mlp.c_fc.weight": (HIDDEN, 4 * HIDDEN),
        "h.1.mlp.experts.down_proj": (3, HIDDEN, 30),
        "h.1.conv.weight": (HIDDEN, 10, 3, 1),
        "wte.weight": (40, HIDDEN),
    }
    base, tuned = {}, {}
    for name, shape in shapes.items():
        is_stack = len(shape) == 3
        m, n = shape[1:] if is_stack else (shape[0], int(np.prod(shape[1:])))
        parts = 3 if "c_attn" in name else 1
        before = [weight(generator, m, n) for _ in range(shape[0] if is_stack else 1)]
        after = [W + np.hstack([new_direction(part) for part in np.split(W, parts, axis=1)]) for W in before]
        for state, found in ((base, before), (tuned, after)):
            state[name] = torch.from_numpy(np.stack(found).reshape(shape)).to(dtype)
    for name, size in (("h.0.ln_1.weight", HIDDEN), ("h.0.attn.c_attn.bias", 3 * HIDDEN), ("h.1.ln.bias", HIDDEN)):
        base[name], tuned[name] = torch.zeros(size, dtype=dtype), torch.randn(size).to(dtype)
    tuned["position_ids"] = torch.arange(7)
    return base, tuned


def safetensors_file(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    return folder / "model.safetensors"


def safetensors_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    safetensors_file(folder, state)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def sharded_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    names = list(state)
    placed = {}
    for number, part in enumerate((names[:3], names[3:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def torch_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def training_checkpoint(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    strided = {name: t.clone().T.contiguous().T if t.ndim == 2 else t for name, t in state.items()}
    torch.save({"epoch": 3, "state_dict": strided, "optimizer": {"m": torch.ones(5)}}, folder / "last.ckpt")
    return folder / "last.ckpt"


def legacy_file(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


FORMATS = [safetensors_file, safetensors_folder, sharded_folder, torch_folder, training_checkpoint, legacy_file]
Writer = Callable[[Path, dict[str, Tensor]], Path]


def loaded(folder: Path) -> dict[str, Tensor]:
    """The tensors of a written folder, by the libraries that users read them with."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            state |= safetensors.torch.load_file(path)
        elif path.suffix in (".bin", ".ckpt", ".pth"):
            content = torch.load(path, weights_only=True)
            state |= content.get("state_dict", content)
    return state


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module", params=FORMATS, ids=lambda writer: writer.__name__)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A base in memory, a tuned checkpoint of one format on disk, and a folder to write into."""
    base, tuned = models()
    place = tmp_path_factory.mktemp("edited")
    writer: Writer = request.param
    return open_checkpoint(base).described("the base", config=CONFIG), writer(place / "tuned", tuned), place / "out"


def test_mitigated_tensors_are_the_formula_and_others_keep_their_bits(written: tuple[Any, Path, Path]) -> None:
    base, source, out = written
    tuned = dict(open_checkpoint(source))
    result = mitigate(base, source, out, factor=0.25, which="all", k=6, force=True)
    state = loaded(out)
    assert set(state) == set(tuned) and result.folder == out
    edited = {}
    for row in result.matrices.to_dict("records"):
        assert row["status"] == "edited" and row["intruders_scaled"] == row["intruders_before"] >= 1, row
    for name, part in [("wte.weight", None), ("h.0.mlp.c_fc.weight", "T"), ("h.1.conv.weight", "K")]:
        W, after, found = (X[name].double().flatten(1).numpy() for X in (base, tuned, state))
        if part == "T":
            W, after, found = W.T, after.T, found.T
        row = result.matrices[result.matrices["name"] == name].iloc[0]
        which = find_intruders({name: torch.from_numpy(W)}, {name: torch.from_numpy(after)}, k=6).intruders["index"]
        assert len(which) == row["intruders_before"]
        expected = reference.mitigated(W, after, 0.25, list(which))
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert np.abs(found - after).max() > 1e-2
        edited[name] = found
    for part in range(3):  # each part of the fused tensor on its own, in its place
        rows = slice(part * HIDDEN, (part + 1) * HIDDEN)
        W, after, found = (X["h.0.attn.c_attn.weight"].double().T[rows].numpy() for X in (base, tuned, state))
        which = find_intruders({"a.weight": torch.from_numpy(W)}, {"a.weight": torch.from_numpy(after)}, k=6).intruders
        np.testing.assert_allclose(found, reference.mitigated(W, after, 0.25, list(which["index"])), atol=1e-6)
    for expert in range(3):
        W, after, found = (X["h.1.mlp.experts.down_proj"][expert].double().numpy() for X in (base, tuned, state))
        which = find_intruders({"a.weight": torch.from_numpy(W)}, {"a.weight": torch.from_numpy(after)}, k=6).intruders
        np.testing.assert_allclose(found, reference.mitigated(W, after, 0.25, list(which["index"])), atol=1e-6)
    matrices = {"h.0.attn.c_attn.weight", "h.1.mlp.experts.down_proj", *edited}
    assert all(torch.equal(state[name], tuned[name]) for name in set(tuned) - matrices)
    after = find_intruders(base, out, k=6).matrices["left_intruders"].tolist()
    assert result.matrices["intruders_after"].tolist() == after


@pytest.mark.parametrize(
    "what",
    [
        Mitigation(factor=1.0, which="all"),
        Mitigation(factor=0.0, epsilon=0.0),
        Scaling(1.0),
        Truncation(rank=1000),
        Truncation(energy=1.0, keep="random"),
    ],
    ids=["lambda 1", "no intruders", "scale 1", "whole rank", "all energy"],
)
def test_identities_give_every_file_back_to_the_bit(written: tuple[Any, Path, Path], what: Any) -> None:
    base, source, out = written
    result = edit(base, source, what, out, force=True)
    assert result.changed == 0 and (result.matrices["status"] == "unchanged").all()
    assert "to the bit" in result.notes[-1]
    found = digests(out)
    assert json.loads((out / "spectra_edit.json").read_text())["options"]["edit"] == type(what).__name__.lower()
    found.pop("spectra_edit.json")
    expected = digests(source) if source.is_dir() else {source.name: digests(source.parent)[source.name]}
    assert found == expected


def test_a_rewound_layer_is_the_base_with_its_vectors(written: tuple[Any, Path, Path]) -> None:
    base, source, out = written
    tuned = dict(open_checkpoint(source))
    result = edit(base, source, Rewinding(), out, layers=[0], force=True)
    state = loaded(out)
    for name in tuned:
        expected = base[name] if name.startswith("h.0.") else tuned[name]
        assert torch.equal(state[name], expected), name
    assert result.matrices["energy_ratio"].eq(0).all() and any("vectors" in note for note in result.notes)


def test_headers_and_metadata_of_safetensors_are_kept(tmp_path: Path) -> None:
    base, tuned = models()
    source = safetensors_folder(tmp_path / "tuned", tuned)
    mitigate(base, source, tmp_path / "out", factor=0.0)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    assert digests(tmp_path / "out").keys() == {*digests(source), "spectra_edit.json"}


def test_a_training_checkpoint_keeps_its_container_and_its_checksums(tmp_path: Path) -> None:
    base, tuned = models()
    source = training_checkpoint(tmp_path / "tuned", tuned)
    mitigate(base, source, tmp_path / "out", factor=0.0)
    content = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)
    assert content["epoch"] == 3 and torch.equal(content["optimizer"]["m"], torch.ones(5))
    assert content["state_dict"]["wte.weight"].stride() == (1, 40)
    with zipfile.ZipFile(tmp_path / "out" / "last.ckpt") as archive:
        assert archive.testzip() is None
    with zipfile.ZipFile(source) as one, zipfile.ZipFile(tmp_path / "out" / "last.ckpt") as other:
        before, after = ({i.filename: i.CRC for i in archive.infolist()} for archive in (one, other))
    assert before.keys() == after.keys() and before != after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_and_rounded_to_nearest(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = models(dtype)
    source = safetensors_file(tmp_path / "tuned", tuned)
    edit(base, source, Scaling(0.3), tmp_path / "out", include="wte.weight")
    found = loaded(tmp_path / "out")["wte.weight"]
    exact = base["wte.weight"].double() + 0.3 * (tuned["wte.weight"].double() - base["wte.weight"].double())
    assert found.dtype == dtype
    spacing = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    assert ((found.double() - exact).abs() <= 0.5001 * spacing.clamp(min=1e-7 if dtype == torch.float16 else 0)).all()
    assert torch.equal(loaded(tmp_path / "out")["h.1.conv.weight"], tuned["h.1.conv.weight"])


def test_interleaved_heads_are_edited_in_their_rows(tmp_path: Path) -> None:
    """GPT-NeoX stores q, k and v head by head: those of the other parts keep their bits."""
    generator = np.random.default_rng(3)
    config = {"model_type": "gpt_neox", "hidden_size": 12, "num_attention_heads": 3}
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    base, tuned = ({name: torch.from_numpy(generator.normal(size=(36, 12))).float()} for _ in range(2))
    folder = safetensors_folder(tmp_path / "tuned", tuned)
    (folder / "config.json").write_text(json.dumps(config))
    base_checkpoint = open_checkpoint(base).described("the base", config=config)
    edit(base_checkpoint, folder, Rewinding(), tmp_path / "out", include="*[[]k]")
    by_head = loaded(tmp_path / "out")[name].reshape(3, 3, 4, 12)  # head, part, row
    assert torch.equal(by_head[:, 1], base[name].reshape(3, 3, 4, 12)[:, 1])
    for part in (0, 2):
        assert torch.equal(by_head[:, part], tuned[name].reshape(3, 3, 4, 12)[:, part])


def test_without_a_folder_the_edited_tensors_are_in_the_result(tmp_path: Path) -> None:
    base, tuned = models()
    source = safetensors_file(tmp_path / "tuned", tuned)
    what = Rewinding(components=(2, 9))
    kept = edit(base, tuned, what, include="h.0.*")
    edit(base, source, what, tmp_path / "out", include="h.0.*")
    state = loaded(tmp_path / "out")
    assert set(kept.tensors) == {"h.0.mlp.c_fc.weight", "h.0.attn.c_attn.weight"} and kept.folder is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in kept.tensors.items())
    W, after, found = (X["h.0.mlp.c_fc.weight"].double().T.numpy() for X in (base, tuned, state))
    np.testing.assert_allclose(found, reference.rewound(W, after, 2, 9), atol=1e-6)


def test_the_control_scales_as_many_base_directions(tmp_path: Path) -> None:
    base, tuned = models()
    W, after = (X["wte.weight"].double().numpy() for X in (base, tuned))
    result = mitigate(base, tuned, factor=0.0, control=True, include="wte.weight")
    change = result.tensors["wte.weight"].double().numpy() - after
    row = find_intruders({"a.weight": base["wte.weight"]}, {"a.weight": tuned["wte.weight"]}).intruders.iloc[0]
    s = np.linalg.svd(W, compute_uv=False)
    at = int(np.abs(s - row["tuned_singular_value"]).argmin())
    U, _, Vt = np.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose(change, -s[at] * np.outer(U[:, at], Vt[at]), atol=1e-6)


@pytest.mark.parametrize("which", ["top", "all"])
def test_a_control_can_be_made_to_change_as_much_as_the_scaling_of_intruders(which: Any) -> None:
    """Per matrix (1 - lambda_c) = (1 - lambda) sqrt(sum s'_j^2 / sum s_i^2); the intruders are stronger than s_0."""
    base, tuned = models()
    tuned = {name: base[name] + 10 * (tuned[name] - base[name]) if name in base else tuned[name] for name in tuned}
    options: dict[str, Any] = {"factor": 0.7, "which": which, "include": "*wte*"}
    scaled = mitigate(base, tuned, **options).matrices
    found = mitigate(base, tuned, control=True, equal_change=True, **options)
    row = found.matrices.iloc[0]
    W, after = (X["wte.weight"].double().numpy() for X in (base, tuned))
    intruders = find_intruders({"a.weight": base["wte.weight"]}, {"a.weight": tuned["wte.weight"]}).intruders
    strengths = intruders["tuned_singular_value"].to_numpy()[: 1 if which == "top" else None]
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    near: list[int] = []
    for strength in strengths:
        near.append(min(set(range(len(s))) - set(near), key=lambda i: abs(s[i] - strength)))
    factor = 1 - 0.3 * np.sqrt((strengths**2).sum() / (s[near] ** 2).sum())
    assert row["control_lambda"] == pytest.approx(factor, rel=1e-5) and factor < 0.7
    change = found.tensors["wte.weight"].double().numpy() - after
    np.testing.assert_allclose(change, (factor - 1) * (U[:, near] * s[near]) @ Vt[near], atol=1e-5)
    assert row["change_norm"] == pytest.approx(scaled["change_norm"][0], rel=1e-5)
    assert not any("control" in note for note in found.notes) and row["note"] == ""
    plain = mitigate(base, tuned, control=True, **options).matrices
    assert plain["control_lambda"].tolist() == [0.7] and scaled["control_lambda"].isna().all()


def test_a_control_of_base_directions_that_are_zero_cannot_change_as_much() -> None:
    base, tuned = {"a.weight": torch.zeros(4, 4)}, {"a.weight": torch.full((4, 4), 0.25)}
    base["a.weight"][0, 0] = 8
    options: dict[str, Any] = {"factor": 0.0, "epsilon": 0.9, "k": 1, "control": True, "equal_change": True}
    result = mitigate(base, tuned, **options)
    row = result.matrices.iloc[0]
    assert (row["status"], row["intruders_before"], row["intruders_scaled"]) == ("unchanged", 1, 0)
    assert "not or not wholly edited, for the base directions nearest in strength are zero: 'a.weight'" in result.notes


def test_what_has_no_directions_is_not_mitigated() -> None:
    """As `find_intruders` has it: of an all-zero base every direction would be new, and none is counted."""
    torch.manual_seed(0)
    zero, some = torch.zeros(40, 50), torch.randn(40, 50)
    for base, tuned, which in ((zero, some, "base"), (some, zero, "tuned")):
        for control in (False, True):
            result = mitigate({"a.weight": base}, {"a.weight": tuned}, factor=0.0, which="all", control=control)
            (row,) = result.matrices.to_dict("records")
            assert (row["status"], row["note"]) == (
                "unchanged",
                f"the {which} weight is all zero and has no directions",
            )
            assert not result.tensors and result.matrices.filter(like="intruders").isna().all(axis=None)
            assert f"not or not wholly edited, for {row['note']}: 'a.weight'" in result.notes
    found = find_intruders({"a.weight": zero}, {"a.weight": some}).matrices
    assert found["left_intruders"].isna().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounding_that_a_mitigation_leaves_is_no_intruder(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(1)
    U, V = orthonormal(generator, 40, 3), orthonormal(generator, 50, 3)
    base = torch.from_numpy(np.outer(U[:, 0], V[:, 0])).to(dtype)
    tuned = torch.from_numpy(2 * np.outer(U[:, 1], V[:, 1]) + np.outer(U[:, 2], V[:, 2])).to(dtype)
    result = mitigate({"a.weight": base}, {"a.weight": tuned}, factor=0.0, which="all", k=2)
    row = result.matrices.iloc[0]
    assert row["intruders_before"] == row["intruders_scaled"] == 2
    assert row["intruders_after"] == row["intruders_appeared"] == (2 if dtype == torch.bfloat16 else 0)


def test_a_full_decomposition_in_the_place_of_a_quick_one_is_said(tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    U, V = orthonormal(generator, 300, 5), orthonormal(generator, 200, 5)
    W, tuned = ({"a.weight": torch.from_numpy((U * [1, 0.5, s, s / 2, s / 4]) @ V.T).float()} for s in (1e-2, 1e-5))
    source = safetensors_file(tmp_path / "tuned", tuned)
    note = "the leading directions of 1 matrix are from a full SVD of W', since squaring would spoil them"
    result = mitigate(W, source, tmp_path / "out", k=5)
    assert note in result.notes and note in json.loads((tmp_path / "out" / "spectra_edit.json").read_text())["notes"]
    assert not any("full SVD" in said for said in mitigate(W, tuned, k=2).notes)


@pytest.mark.parametrize("what", [Scaling(0.0), Rewinding(), Truncation(rank=1), Mitigation()])
def test_what_the_base_lacks_is_named(what: Any, tmp_path: Path) -> None:
    base, tuned = models()
    tuned |= {
        "classifier.weight": torch.ones(3, HIDDEN),
        "classifier.bias": torch.ones(3),
        "h.1.extra.bias": torch.ones(4),
    }
    base["pooler.bias"], tuned["pooler.bias"] = torch.zeros(5), torch.zeros(6)  # of another shape
    result = edit(base, safetensors_file(tmp_path / "tuned", tuned), what, tmp_path / "out")
    said = [note for note in result.notes if "base has none" in note]
    names = ["'classifier.bias'", "'classifier.weight'", "'h.1.extra.bias'", "'pooler.bias'"]
    expected = names if isinstance(what, Scaling | Rewinding) else names[1:2]
    assert [sorted(note.partition(": ")[2].split(", ")) for note in said] == [expected]
    assert said[0].startswith("tensors that stay tuned")
    assert all(torch.equal(loaded(tmp_path / "out")[name.strip("'")], tuned[name.strip("'")]) for name in names)
    assert not any("base has none" in note for note in edit(base, tuned, what, include="wte.*").notes)
    assert not any("base has none" in note for note in edit(base, tuned, what, layers=[0]).notes)


def test_a_fused_tensor_whose_parts_are_all_excluded_stays() -> None:
    base, tuned = models()
    config = open_checkpoint(base).described("the base", config=CONFIG)
    result = edit(config, tuned, Scaling(0.5), exclude="*c_attn.weight*")
    assert "h.0.attn.c_attn.weight" not in result.tensors and "wte.weight" in result.tensors
    assert "h.0.attn.c_attn.weight" not in edit(config, tuned, Scaling(0.5), exclude="*[[]?]").tensors


def test_what_is_no_edit_is_refused() -> None:
    base, tuned = models()
    for what in ("rewind", None, Rewinding):
        with pytest.raises(SpectraError, match="is no edit; give a Mitigation, Truncation, Scaling or Rewinding"):
            edit(base, tuned, what)  # type: ignore[arg-type]


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    base, tuned = models()
    source = safetensors_file(tmp_path / "tuned", tuned)
    for place in ("disk/real", "empty"):
        (tmp_path / place).mkdir(parents=True)
    edit(base, source, Scaling(0.5), tmp_path / "disk" / "real")
    for name, place in (("link", "disk/real"), ("other", "empty"), ("ahead", "disk/new/er")):
        (tmp_path / name).symlink_to(tmp_path / place)
        result = edit(base, source, Scaling(0.0), tmp_path / name, force=name == "link")
        assert result.folder == tmp_path / name and (tmp_path / name).is_symlink()
        assert torch.equal(loaded(tmp_path / place)["wte.weight"], base["wte.weight"])
    assert {path.name for path in tmp_path.iterdir()} == {"tuned", "disk", "empty", "link", "other", "ahead"}
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"real", "new"}


def test_nothing_is_written_into_an_input(tmp_path: Path) -> None:
    base, tuned = models()
    files = safetensors_folder(tmp_path / "base", base), safetensors_folder(tmp_path / "tuned", tuned)
    (tmp_path / "link").symlink_to(tmp_path / "tuned")
    for place in ("tuned/sub", "tuned/1_Pooling/deep/er", "link/sub", "base/sub"):
        with pytest.raises(SpectraError, match=r"lies inside .*(tuned|base), .* choose a folder outside of it"):
            edit(*files, Scaling(0.5), tmp_path / place)
    assert {path.name for path in (tmp_path / "tuned").rglob("*")} == {*digests(files[1]), "1_Pooling"} - {
        "1_Pooling/config.json"
    }
    # A file does not own the folder that it lies in.
    edit(base, files[1] / "model.safetensors", Scaling(0.5), tmp_path / "tuned" / "of_the_file")


def test_parents_that_an_edit_made_go_with_it(tmp_path: Path) -> None:
    base, tuned = models()
    source = safetensors_file(
        tmp_path / "tuned", {name: W * torch.nan if W.ndim > 1 else W for name, W in tuned.items()}
    )
    (tmp_path / "there").mkdir()
    with pytest.raises(SpectraError, match="nothing was written"):
        mitigate(base, source, tmp_path / "there" / "a" / "b" / "out")
    assert not any((tmp_path / "there").iterdir())
    edit(base, safetensors_file(tmp_path / "sound", tuned), Scaling(0.5), tmp_path / "there" / "a" / "b" / "out")
    assert (tmp_path / "there" / "a" / "b" / "out" / "model.safetensors").exists()


def test_nothing_is_overwritten_unless_forced_and_never_an_input(tmp_path: Path) -> None:
    base, tuned = models()
    source = safetensors_folder(tmp_path / "tuned", tuned)
    before = digests(source)
    mitigate(base, source, tmp_path / "out", factor=0.0)
    with pytest.raises(SpectraError, match="holds files already"):
        mitigate(base, source, tmp_path / "out", factor=0.5)
    first = loaded(tmp_path / "out")
    mitigate(base, source, tmp_path / "out", factor=0.5, force=True)
    assert not torch.equal(first["wte.weight"], loaded(tmp_path / "out")["wte.weight"])
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(SpectraError, match=r"thesis\.tex"):
        mitigate(base, source, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.tex").exists()
    for target in (source, tmp_path):
        with pytest.raises(SpectraError, match="would be lost"):
            mitigate(base, source, target, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(SpectraError, match=r"is a file|choose another"):
        mitigate(base, source, tmp_path / "file")
    assert digests(source) == before
    assert {path.name for path in tmp_path.iterdir()} == {"tuned", "out", "file"}  # no temporary is left


def test_other_weights_of_the_folder_are_not_passed_off_as_edited(tmp_path: Path) -> None:
    base, tuned = models()
    source = safetensors_folder(tmp_path / "tuned", tuned)
    torch.save(tuned, source / "pytorch_model.bin")
    (source / "tf_model.h5").write_bytes(b"old")
    shutil.copytree(source / "1_Pooling", source / "checkpoint-5")
    shutil.copy(source / "model.safetensors", source / "checkpoint-5")
    result = mitigate(base, source, tmp_path / "out")
    there = digests(tmp_path / "out")
    assert not any("pytorch_model" in name or "h5" in name or "checkpoint" in name for name in there)
    assert "1_Pooling/config.json" in there
    assert any("not copied" in note and "tf_model.h5" in note for note in result.notes)


def test_a_matrix_that_fails_keeps_its_bits_and_says_so(tmp_path: Path) -> None:
    base, tuned = models()
    tuned["wte.weight"][0, 0] = torch.nan
    source = safetensors_file(tmp_path / "tuned", tuned)
    result = mitigate(base, source, tmp_path / "out", factor=0.0)
    row = result.matrices[result.matrices["name"] == "wte.weight"].iloc[0]
    assert row["status"] == "failed" and "NaN" in row["note"]
    assert "failed" in result.notes[-1]
    found = loaded(tmp_path / "out")["wte.weight"]
    assert torch.equal(found.view(torch.int32), tuned["wte.weight"].view(torch.int32))


def test_an_overflow_is_refused_and_the_matrix_kept() -> None:
    base, tuned = (
        {"a.weight": torch.eye(4).half() * scale, "b.weight": torch.eye(4).half() * min(scale, 2)}
        for scale in (1, 60_000)
    )
    result = edit(base, tuned, Scaling(4.0))
    assert result.matrices["status"].tolist() == ["failed", "edited"]
    assert "overflows float16" in result.matrices["note"][0]
    with pytest.raises(SpectraError, match=r"no matrix could be edited, and nothing was written; .*overflows float16"):
        edit(base, tuned, Scaling(4.0), include="a.*")
    vectors = ({"b.weight": torch.eye(4).half(), "b.bias": torch.ones(4).half() * size} for size in (1, 40_000))
    with pytest.raises(SpectraError, match=r"'b\.bias' overflows float16"):
        edit(*vectors, Scaling(2.0))


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0])
def test_a_scaled_update_takes_the_vectors_along(factor: float, written: tuple[Any, Path, Path]) -> None:
    base, source, out = written
    tuned = dict(open_checkpoint(source))
    edit(base, source, Scaling(factor), out, force=True)
    state = loaded(out)
    vectors = [name for name in tuned if tuned[name].ndim == 1 and name in base and tuned[name].is_floating_point()]
    assert any(not torch.equal(base[name], tuned[name]) for name in vectors)
    for name in vectors:
        expected = base[name].double() + factor * (tuned[name].double() - base[name].double())
        torch.testing.assert_close(state[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert factor != 0 or torch.equal(state[name], base[name])


def test_the_control_says_where_it_moves_less_than_the_intruders(tmp_path: Path) -> None:
    """The intruders here are weaker than s_0, so that equals exist; ten times as strong, none does."""
    base, tuned = models()
    like = mitigate(base, tuned, factor=0.0, control=True, include="wte.weight")
    assert not any("control" in note for note in like.notes) and like.matrices["note"].tolist() == [""]
    strong = {name: base[name] + 10 * (tuned[name] - base[name]) if name in base else tuned[name] for name in tuned}
    unlike = mitigate(base, strong, factor=0.0, control=True, include="wte.weight")
    scaled = mitigate(base, strong, factor=0.0, include="wte.weight").matrices["change_norm"][0]
    moved = unlike.matrices["change_norm"][0]
    assert moved < 0.5 * scaled
    assert f"changes it by {scaled:.3g}" in unlike.matrices["note"][0]
    assert any(f"weights by {moved:.3g}" in note and f"by {scaled:.3g} at the same" in note for note in unlike.notes)


@pytest.mark.parametrize("layout", ["fused", "apart", "per head"])
def test_a_rewound_head_has_the_base_s_biases(layout: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    names = {
        "fused": ["h.0.attn.c_attn"],
        "apart": [f"encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")],
        "per head": ["gpt_neox.layers.0.attention.query_key_value"],
    }[layout]
    kind = {"fused": "gpt2", "apart": "bert", "per head": "gpt_neox"}[layout]
    config = {"model_type": kind, "hidden_size": HIDDEN, "num_attention_heads": 4}
    width = HIDDEN if layout == "apart" else 3 * HIDDEN
    shape = (HIDDEN, width) if layout == "fused" else (width, HIDDEN)
    base, tuned = (
        {f"{name}.{end}": torch.randn(size, generator=generator) for name in names
         for end, size in (("weight", shape), ("bias", (width,)))} for _ in range(2)
    )  # fmt: skip
    folder = safetensors_folder(tmp_path / "tuned", tuned)
    (folder / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(base).described("the base", config=config)
    result = edit(source, folder, Rewinding(heads=[1, 2]), tmp_path / "out")
    assert f"vectors (biases, norms) that were taken along: {len(names)}" in result.notes
    state = loaded(tmp_path / "out")
    for name in names:
        for end in ("weight", "bias"):
            W, before, after = (X[f"{name}.{end}"] for X in (base, tuned, state))
            if layout == "fused" and end == "weight":
                W, before, after = W.T, before.T, after.T
            W, before, after = (
                X.reshape(4, 3, 6, -1).transpose(0, 1) if layout == "per head" else X.reshape(-1, 4, 6, X[0].numel())
                for X in (W, before, after)
            )  # (part, head, row, column)
            for head in range(4):
                assert torch.equal(after[:, head], (W if head in (1, 2) else before)[:, head]), (end, head)


def test_biases_whose_heads_are_not_known_stay_and_are_named() -> None:
    base, tuned = (
        {"blocks.0.attn.qkv.weight": torch.eye(36, 12) * scale, "blocks.0.attn.q_bias": torch.ones(12) * scale,
         "blocks.0.attn.proj.weight": torch.eye(12) * scale, "blocks.0.attn.proj.bias": torch.ones(12) * scale}
        for scale in (1, 2)
    )  # fmt: skip
    result = edit(base, tuned, Rewinding(heads=[0], head_size=4))
    assert set(result.tensors) == {"blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"}
    said = "biases that stay tuned, for how the heads lie in them is not known: 'blocks.0.attn.q_bias'"
    assert said in result.notes


def test_other_parts_of_a_model_are_copied_with_their_weights(tmp_path: Path) -> None:
    """A dense layer, a file that only ends like weights; not the model again, in other formats or states."""
    base, tuned = models()
    source = safetensors_folder(tmp_path / "tuned", tuned)
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text("{}")
    safetensors.torch.save_file({"linear.weight": torch.eye(3)}, source / "2_Dense" / "model.safetensors")
    (source / "3_Dense").mkdir()
    torch.save({"linear.weight": torch.eye(3)}, source / "3_Dense" / "pytorch_model.bin")
    (source / "vocab.bin").write_bytes(b"many words")
    torch.save({"v_head.weight": torch.ones(1, 4)}, source / "value_head.bin")
    for left in ("checkpoint-5", "onnx", "openvino", ".cache"):
        (source / left).mkdir()
        (source / left / "config.json").write_text("{}")
    safetensors.torch.save_file(tuned, source / "checkpoint-5" / "model.safetensors")
    (source / "onnx" / "model.onnx").write_bytes(b"graph")
    (source / "openvino" / "openvino_model.bin").write_bytes(b"graph")
    (source / "openvino" / "openvino_model.xml").write_text("<net/>")
    (source / "gone.txt").symlink_to("nowhere")
    (source / "elsewhere").symlink_to(source / "1_Pooling")
    result = edit(base, source, Scaling(0.5), tmp_path / "out", include="wte.weight")
    there = digests(tmp_path / "out")
    kept = {"2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/pytorch_model.bin", "vocab.bin"}
    assert kept | {"value_head.bin", "1_Pooling/config.json"} <= there.keys()
    assert all(there[name] == digests(source)[name] for name in kept)
    assert not any(name.startswith(("checkpoint", "onnx", "openvino", ".", "gone", "else")) for name in there)
    assert "not copied, for their weights are not edited: 'checkpoint-5', 'onnx', 'openvino'" in result.notes
    copied = next(note for note in result.notes if note.startswith("copied as they are, for they hold nothing of the"))
    assert "'vocab.bin'" in copied and "'2_Dense/model.safetensors'" in copied
    assert "not copied, for they are hidden folders or links to folders: '.cache', 'elsewhere'" in result.notes
    assert "not copied, for they are links to files that are not there: 'gone.txt'" in result.notes


def test_force_replaces_an_earlier_edit_of_another_layout_and_nothing_else(tmp_path: Path) -> None:
    base, tuned = models()
    first, second = sharded_folder(tmp_path / "first", tuned), safetensors_file(tmp_path / "second", tuned)
    out = tmp_path / "out"
    edit(base, first, Scaling(0.5), out)
    edit(base, second, Scaling(0.5), out, force=True)
    assert digests(out).keys() == {"model.safetensors", "spectra_edit.json"}
    edit(base, first, Scaling(0.5), out, force=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SpectraError, match=r"'notes\.txt', which no edit wrote"):
        edit(base, second, Scaling(0.5), out, force=True)
    own = safetensors_folder(tmp_path / "own", base)
    before = digests(own)
    with pytest.raises(SpectraError, match="which no edit left there"):
        edit(base, first, Scaling(0.5), own, force=True)
    assert digests(own) == before


def test_what_killed_runs_left_is_named(tmp_path: Path) -> None:
    base, tuned = models()
    source = safetensors_file(tmp_path / "tuned", tuned)
    for name in (".out.biamjfez", ".out.notours!", ".other.biamjfez"):
        (tmp_path / name).mkdir()
    result = edit(base, source, Scaling(0.5), tmp_path / "out")
    assert next(note for note in result.notes if "killed" in note).endswith("still write there: '.out.biamjfez'")
    assert (tmp_path / ".out.biamjfez").exists()


def test_weights_in_memory_have_no_format(tmp_path: Path) -> None:
    base, tuned = models()
    with pytest.raises(SpectraError, match="no files"):
        mitigate(base, tuned, tmp_path / "out")


def test_what_reads_back_otherwise_is_refused(tmp_path: Path) -> None:
    """One byte flips on the way to the disk: of an edited tensor, of another one."""
    base, tuned = models()
    source = safetensors_file(tmp_path / "tuned", tuned)
    checkpoint = open_checkpoint(source)
    for name in ("wte.weight", "h.1.ln.bias"):
        copy = tmp_path / name
        copy.mkdir()
        shutil.copy(source, copy)
        files = InFiles(checkpoint, source.parent, copy)
        files.write("wte.weight", None, base["wte.weight"])
        files.finish()
        files.check()
        with (copy / source.name).open("r+b") as file:
            file.seek(lying_at(checkpoint, name).start)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(SpectraError, match=f"'{name}' read back otherwise"):
            files.check()


def test_layers_that_are_not_there_are_refused() -> None:
    base, tuned = models()
    with pytest.raises(SpectraError, match="layer 9"):
        edit(base, tuned, Scaling(0.5), layers=[9])


@pytest.mark.parametrize("layers", [[], range(5, 1), "0", 0, [0.5]])
def test_layers_that_name_none_are_not_all(layers: Any) -> None:
    base, tuned = models()
    with pytest.raises(SpectraError, match="layers"):
        edit(base, tuned, Rewinding(), layers=layers)


def test_a_tensor_tied_by_the_tuned_model_is_not_edited_against_two_of_the_base(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    base = {embedding: torch.eye(8, 4), head: torch.ones(8, 4), "model.layers.0.mlp.up_proj.weight": torch.eye(4)}
    tuned = {name: 2 * W for name, W in base.items() if name != head}
    source = safetensors_folder(tmp_path / "tuned", tuned)
    (source / "config.json").write_text(json.dumps(config))
    apart = open_checkpoint(base).described("the base", config=config | {"tie_word_embeddings": False})
    for folder in (None, tmp_path / "out"):
        with pytest.raises(SpectraError, match=f"against both '{embedding}' and '{head}' of the base; exclude one"):
            edit(apart, source, Scaling(0.5), folder)
    edit(apart, source, Scaling(0.5), tmp_path / "out", exclude=head)
    torch.testing.assert_close(loaded(tmp_path / "out")[embedding], 1.5 * base[embedding])
    twice = open_checkpoint({**base, head: base[embedding].clone()}).described("the base", config=apart.config)
    assert edit(twice, source, Scaling(0.5), tmp_path / "same").changed == 3  # the base keeps two copies of one


def test_components_beyond_every_matrix_are_refused() -> None:
    base, tuned = models()
    with pytest.raises(SpectraError, match="from 24 on lie beyond every matrix, for the largest has 24"):
        edit(base, tuned, Rewinding(components=(24, 30)))
    small = {"fc.weight": torch.eye(3, 9)}
    rows = edit(base | small, tuned | {"fc.weight": torch.ones(3, 9)}, Rewinding(components=(5, 30))).matrices
    row = rows.set_index("name").loc["fc.weight"]
    assert (row["status"], row["note"]) == ("unchanged", "has no component from 5 on")
    assert (rows["status"] == "edited").sum() == len(rows) - 1
