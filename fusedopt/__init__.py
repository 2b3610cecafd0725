from fusedopt._version import __version__
