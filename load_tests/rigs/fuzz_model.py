"""The model that is fuzzed: the rig's, with so small a context that no request takes long."""

from __future__ import annotations

import dataclasses

from load_tests.rigs.fuzz_samples import MAX_MODEL_LEN, MODEL
from load_tests.rigs.router_model import VOCAB_SIZE, rig_model
from router.model import ServedModel
from workers.fake import fake_manifest
from workers.types import ModelManifest


def small_manifest() -> ModelManifest:
    return fake_manifest(name=MODEL, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)


def small_model() -> ServedModel:
    return dataclasses.replace(rig_model(), manifest=small_manifest())
