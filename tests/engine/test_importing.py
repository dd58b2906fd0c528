"""Published checkpoints as runs: all kinds, at their published sizes, with random weights; and files that are none."""

import json
import math
import shutil

import pytest
import torch

from msf_fast.commands import command
from msf_fast.data.conversion import convert
from msf_fast.data.shapes import make_shapes
from msf_fast.engine.importing import import_run, read_published
from msf_fast.engine.pipeline import load_run, make_accelerator
from msf_fast.engine.splits import Splits
from msf_fast.errors import CheckpointError, ConfigError
from msf_fast.published import to_published

KINDS = {"vqvae-c256-msf": "vqvae", "vqvae-c4-msf": "vqvae", "slate-msf": "slate", "slotdiffusion-msf": "slotdiffusion"}


@pytest.fixture(scope="module")
def keys(vectors):
    return json.loads((vectors / "published" / "keys.json").read_text())


def random_tensors(shapes, seed=0):
    """As large as trained ones are, so that slots differ."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name, shape):
        values = torch.randn(shape, generator=generator)
        if name.startswith("m.initializ"):
            return values
        if len(shape) > 1:
            return values / math.sqrt(math.prod(shape[1:]))
        return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values

    return {name: draw(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def files(keys, tmp_path_factory):
    """A file of each kind; a second stage's frozen autoencoder is the first stage's."""
    folder = tmp_path_factory.mktemp("published")
    for channels, second in (("c256", "slate-msf"), ("c4", "slotdiffusion-msf")):
        first = random_tensors(keys[f"vqvae-{channels}-msf"])
        tensors = random_tensors(keys[second], 1)
        tensors |= {name: first[name.replace("m.mediat.", "m.")] for name in tensors if name.startswith("m.mediat.")}
        torch.save(first, folder / f"vqvae-{channels}-msf.pth")
        torch.save(tensors, folder / f"{second}.pth")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_import_and_export_are_the_same_tensors(files, kind, tmp_path):
    path, folder = files / f"{kind}.pth", tmp_path / "run"
    second = KINDS[kind] != "vqvae"
    autoencoder = files / f"vqvae-{'c256' if kind == 'slate-msf' else 'c4'}-msf.pth" if second else None
    config = import_run(path, folder, autoencoder, "shapes")
    assert config.method == KINDS[kind]
    if not second:
        return
    tensors, layout = read_published(path)
    _, model = load_run(folder, "last")
    again = to_published(model.state_dict(), layout)
    assert set(tensors) == set(again)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


class Executed:
    def __reduce__(self):
        return print, ("executed",)


def spoilt(files, tmp_path, change, kind="slate-msf"):
    tensors = torch.load(files / f"{kind}.pth", weights_only=True)
    change(tensors)
    torch.save(tensors, tmp_path / "spoilt.pth")
    return tmp_path / "spoilt.pth"


def refused(path, tmp_path, autoencoder=None):
    folder = tmp_path / "refused"
    with pytest.raises(CheckpointError) as caught:
        import_run(path, folder, autoencoder, "shapes")
    assert not folder.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_none_are_refused(files, tmp_path, capsys):
    whole = (files / "slate-msf.pth").read_bytes()
    path = tmp_path / "file.pth"
    assert "no such file" in refused(path, tmp_path)
    for content in (b"", b"rubbish" * 1000, whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert "damaged, or not written by torch.save" in refused(path, tmp_path)
    torch.save(Executed(), path)
    assert "not a plain dictionary of tensors" in refused(path, tmp_path)
    assert "executed" not in capsys.readouterr().out
    for content in ([torch.zeros(2)], {"state": {"m.encode.3.bias": torch.zeros(2)}}, torch.zeros(3)):
        torch.save(content, path)
        assert "not a plain dictionary of tensors" in refused(path, tmp_path)
    torch.save({"layer.weight": torch.zeros(2)}, path)
    assert "no published checkpoint: 1 tensors, such as layer.weight" in refused(path, tmp_path)


def test_wrong_tensors_are_named(files, tmp_path):
    name = "m.aggregat.rnn.weight_ih"
    path = spoilt(files, tmp_path, lambda tensors: tensors.pop(name))
    assert f"1 tensors are missing, such as {name}" in refused(path, tmp_path)
    path = spoilt(files, tmp_path, lambda tensors: tensors.pop("m.mediat.quant.1.codebook.weight"))
    assert "tensor m.mediat.quant.1.codebook.weight is missing" in refused(path, tmp_path)
    path = spoilt(files, tmp_path, lambda tensors: tensors.update({"m.surplus": torch.zeros(2)}))
    assert "tensor m.surplus: not a name of the published slate checkpoint" in refused(path, tmp_path)
    path = spoilt(files, tmp_path, lambda tensors: tensors.update({"m.aggregat.ffn.9.bias": torch.zeros(2)}))
    assert "1 tensors too many, such as m.aggregat.ffn.9.bias" in refused(path, tmp_path)
    path = spoilt(files, tmp_path, lambda tensors: tensors.update({name: torch.zeros(3, 2)}))
    assert f"tensor {name} is (3, 2); expected (768, 256)" in refused(path, tmp_path)


def test_the_position_embedding_has_two_names(files, tmp_path):
    def rename(tensors):
        tensors["m.decode.posit_embed.pe"] = tensors.pop("m.decode.posit_embed._pe")

    import_run(spoilt(files, tmp_path, rename), tmp_path / "run", None, "shapes")


def test_another_autoencoder_is_refused(files, tmp_path):
    path = files / "slate-msf.pth"
    line = refused(path, tmp_path, files / "vqvae-c4-msf.pth")
    assert f"not the autoencoder of {path}" in line
    assert "expected the autoencoder" in refused(path, tmp_path, path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="holds a run already"):
        import_run(path, tmp_path, None, "shapes")


def test_an_imported_run_is_like_any_other(files, tmp_path, capsys):
    """Evaluated, moved, evaluated again; composed with its autoencoder; not resumed."""
    data = tmp_path / "data"
    make_shapes(data, train=4, val=2, size=256, workers=1)
    for name, autoencoder in (("masks", ()), ("whole", ("--autoencoder", files / "vqvae-c256-msf.pth"))):
        run(
            "import",
            files / "slate-msf.pth",
            "--run-dir",
            tmp_path / name,
            "--data",
            "shapes",
            "--data-dir",
            data,
            *autoencoder,
        )
        run("evaluate", "--run-dir", tmp_path / name, "--device", "cpu")
    found = [
        json.loads((tmp_path / name / "evaluation" / "evaluation.json").read_text()) for name in ("masks", "whole")
    ]
    assert found[0] == found[1]
    assert found[0]["protocol"] == "published"
    shutil.move(tmp_path / "whole", tmp_path / "moved")
    run("evaluate", "--run-dir", tmp_path / "moved", "--device", "cpu", "--protocol", "void-ignored")
    run("compose", "--run-dir", tmp_path / "moved", "--device", "cpu")
    with pytest.raises(ConfigError, match="generates no images from slots"):
        run("compose", "--run-dir", tmp_path / "masks", "--device", "cpu")
    with pytest.raises(CheckpointError, match=r"imported from .* without a training state"):
        command("train", "python -m train.slate_msf", method="slate")(
            [
                "--batch-size",
                "2",
                "--autoencoder-batch-size",
                "2",
                "--resume",
                "--run-dir",
                str(tmp_path / "moved"),
                "--device",
                "cpu",
            ]
        )


@pytest.mark.parametrize("kind", ["slate-msf", "slotdiffusion-msf"])
def test_masks_of_real_images_survive_export_and_import(files, real_data, kind, tmp_path):
    data = tmp_path / "coco"
    convert("coco", real_data / "coco_panoptic", data, limit=4)
    folders = tmp_path / "first", tmp_path / "second"
    import_run(files / f"{kind}.pth", folders[0], None, "coco", data)
    config, model = load_run(folders[0], "best")
    torch.save(to_published(model.state_dict(), read_published(files / f"{kind}.pth")[1]), tmp_path / "exported.pth")
    import_run(tmp_path / "exported.pth", folders[1], None, "coco", data)
    assert config.image_size == 256
    run("evaluate", "--run-dir", folders[0], "--device", "cpu", "--batch-size", 4, "--separability")
    found = json.loads((folders[0] / "evaluation" / "evaluation.json").read_text())
    assert found["images"] == 4
    assert found["separability"]["images"] == 4
    assert found["separability"]["fused"]["inter_object"] > 0
    (batch,) = Splits(config, make_accelerator(config), train=False).evaluation(4)
    masks = [load_run(folder, "best")[1].eval().segment(batch, reconstruct=False).masks for folder in folders]
    assert masks[0].shape == (4, 256, 256)
    assert len(masks[0].unique()) > 1
    assert torch.equal(*masks)


def run(name, *arguments):
    command(name, f"msf-fast {name}")(list(map(str, arguments)))
