# The same targets in CI and on a laptop. Each installs what it misses.
.PHONY: deb demo test test-unit test-host test-openstack test-vm bench-attach bench-stores

deb:
	scripts/deb

demo:
	scripts/demo

test:
	scripts/test

test-unit test-host test-openstack test-vm:
	scripts/test $(@:test-%=%)

bench-attach:
	benches/attach

bench-stores:
	benches/stores
