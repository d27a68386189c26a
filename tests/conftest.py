"""Begins, with the session, what tests wait for in processes of their own."""

BEGUN = []


def pytest_collection_finish(session):
    if session.config.option.collectonly:
        return
    for module in {item.module for item in session.items if item.path.name == "test_triton_interpreter.py"}:
        BEGUN.append((module, module.begin(session)))


def pytest_sessionfinish():
    for module, pool in BEGUN:
        module.end(pool)
