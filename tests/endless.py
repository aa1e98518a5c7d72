"""Answers that no token ends, so that tests decide how long they are."""

from __future__ import annotations

from dataclasses import replace

from edgeprune.runtime.session import Session


def endless(session: Session) -> None:
    """Let no token end an answer of this session."""
    manifest = session.engine.manifest
    text = replace(manifest.text, eos_token_ids=())
    session.engine.manifest = replace(manifest, text=text)
