"""Make the cells of notebooks tests, wherever pytest is started: see tests/cells.py.

Everything else that the tests prepare stands in tests/conftest.py. The two are apart
because pytest reads that one only where it is asked for tests of that folder.
"""

pytest_plugins = ["cells"]
