"""The GPU kit, `make gpu`: everything that only a GPU can show, as units of work that are saved one by one."""
