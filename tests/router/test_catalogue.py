"""The models of one router: opened side by side, failed one by one, tried again."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest
from octavo.names import Reason

from cluster.model_cache import ModelCache
from cluster.model_fake import fake_files
from router import catalogue
from router.catalogue import Catalogue
from router.model import Models, ModelSource, ServedModel, UnservedModel
from tests.router.rig import eventually, running, served_model, text_request
from workers.errors import ModelFileError
from workers.types import ModelFiles

SOURCES = tuple(ModelSource(name=name, files=f"{name}-files", group=f"Worker-{name}") for name in ("a", "b", "c"))


class Files:
    """Those of the model `fake` for every name but the missing."""

    def __init__(self, folder: Path, *missing: str) -> None:
        self.missing = set(missing)
        self._files = fake_files(ModelCache(folder))

    def __call__(self, name: str) -> ModelFiles:
        if name in self.missing:
            raise ModelFileError(f"{name} are not here")
        return self._files


class Served(list[str]):
    def __call__(self, source: ModelSource, model: ServedModel) -> None:
        assert model.manifest.name == source.name
        self.append(source.name)


async def test_models_are_opened_side_by_side_and_listed_as_they_were_configured(tmp_path: Path) -> None:
    files, together = Files(tmp_path), threading.Barrier(3, timeout=30)

    def find(name: str) -> ModelFiles:
        together.wait()
        return files(name)

    served = Served()
    models = Catalogue(SOURCES, find, served)
    await models.load()
    assert sorted(served) == list(models.models) == ["a", "b", "c"]
    assert models.failures == {}
    await models.stop()


async def test_one_that_cannot_be_opened_leaves_the_others_alone_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "RETRY_S", 0.01)
    files, served = Files(tmp_path, "b-files"), Served()
    models = Catalogue(SOURCES, files, served)
    await models.load()
    assert models.failures == {"b": "b-files are not here"}
    assert sorted(served) == ["a", "c"]
    files.missing.clear()
    await eventually(lambda: models.failures == {})
    assert isinstance(models.models["b"], ServedModel)
    assert list(models.models) == ["a", "b", "c"]
    assert sorted(served) == ["a", "b", "c"]
    await models.stop()


async def test_one_whose_files_take_long_follows_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "PATIENCE_S", 0.01)
    files, served, fetched, begun = Files(tmp_path), Served(), threading.Event(), threading.Event()

    def find(name: str) -> ModelFiles:
        if name == "b-files":
            begun.set()
        else:  # and one there must be, however long it takes
            assert begun.wait(30)
        assert name != "b-files" or fetched.wait(30)
        return files(name)

    models = Catalogue(SOURCES[:2], find, served)
    await models.load()
    assert models.failures == {"b": catalogue.LATE}
    assert (served, list(models.models)) == (["a"], ["a", "b"])
    fetched.set()
    await eventually(lambda: models.failures == {})
    assert served == ["a", "b"]
    await models.stop()


async def test_an_only_model_and_the_last_of_several_fail_the_start(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"^a-files are not here$"):
        await Catalogue(SOURCES[:1], Files(tmp_path, "a-files"), Served()).load()
    files = Files(tmp_path, "a-files", "b-files", "c-files")
    with pytest.raises(ModelFileError, match=r"none of the models .*: a: a-files are not here; b: .*; c: "):
        await Catalogue(SOURCES, files, Served()).load()


@pytest.mark.parametrize("way", ["generate", "session"])
async def test_requests_for_a_model_that_cannot_be_served_hear_why(way: str) -> None:
    models: Models = {"toy": served_model(), "lost": UnservedModel("its files are not here")}
    async with running(models) as rig:
        outcome = await rig.run(way, text_request(model="lost"))
        assert outcome.code is grpc.StatusCode.UNAVAILABLE
        assert outcome.reason == Reason.MODEL_FAILED
        assert outcome.message == "model lost cannot be served: its files are not here"
        assert outcome.retry_after_s
        unnamed = await rig.run(way, text_request())
        assert unnamed.code is grpc.StatusCode.NOT_FOUND
        assert "lost, toy" in unnamed.message
