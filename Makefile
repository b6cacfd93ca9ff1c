# The same targets in CI and on a laptop. Each installs what it misses.
.PHONY: demo test test-unit test-host test-vm bench-attach

demo:
	scripts/demo

test:
	scripts/test

test-unit test-host test-vm:
	scripts/test $(@:test-%=%)

bench-attach:
	benches/attach
