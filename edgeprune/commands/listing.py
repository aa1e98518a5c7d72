"""`edgeprune methods` and `edgeprune models`: what there is to choose from."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    methods = commands.add_parser("methods", help="list the pruning methods and their options")
    methods.set_defaults(run=run_methods)
    models = commands.add_parser("models", help="list the model families")
    models.set_defaults(run=run_models)


def run_methods(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from edgeprune import policies

    width = max(map(len, policies.names()))
    for name in policies.names():
        policy = policies.load(name)
        sites = ", ".join(policy.sites) or "none"
        print(f"{name:<{width}} {policy.summary}")
        print(f"{'':<{width}} site: {sites}" + (f"; paper: {policy.paper}" if policy.paper else ""))
        options = [f"{f.name}={f.default}" for f in fields(policy)]
        if options:
            print(f"{'':<{width}} options (--set): {', '.join(options)}")
    return 0


def run_models(args: argparse.Namespace) -> int:
    from importlib import import_module

    from edgeprune import models

    for name in models.names():
        summary = (import_module(f"edgeprune.models.{name}").__doc__ or "").strip()
        print(f"{name:<10} {summary.splitlines()[0]}")
    print(f"{'demo':<10} the embedded demo checkpoint, a small trained LLaVA: --model demo")
    return 0
