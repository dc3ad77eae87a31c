"""Under `pytest --nbval` the notebooks write to a folder of their own and show no progress bars."""

import os
import shutil
import tempfile


def pytest_configure(config):
    if config.getoption("nbval", False) and "KIT_OUTPUTS" not in os.environ:
        folder = tempfile.mkdtemp(prefix="kit-nbval-")
        os.environ.update(KIT_OUTPUTS=folder, KIT_PROGRESS="off")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
