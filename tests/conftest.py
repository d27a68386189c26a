"""Begins, with the session, what tests wait for in processes of their own."""

POOLS = []


def pytest_collection_finish(session):
    if session.config.option.collectonly:
        return
    for module in {item.module for item in session.items if item.path.name == "test_triton_interpreter.py"}:
        POOLS.append(module.begin(session))


def pytest_sessionfinish():
    for pool in POOLS:
        pool.shutdown(cancel_futures=True)
