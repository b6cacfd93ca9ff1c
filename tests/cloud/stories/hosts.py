"""What happens to a compute host and its servers while a volume is in use."""
import signal

from cloud import *


def in_use(user, server):
    volume = user.volume()
    server.attach(volume, had=0)
    return volume


def a_hard_reboot_finds_the_volume_again():
    demo = User('demo')
    server = Server.of(demo)
    volume = in_use(demo, server)
    server.reboots_hard(volume, had=1)
    assert volume.shows_nothing()
    server.detach(volume)
    volume.delete()


def a_stopped_server_starts_with_its_volume():
    demo = User('demo')
    server = Server.of(demo)
    volume = in_use(demo, server)
    status = lambda: demo.cloud.compute.get_server(server.id).status
    server.nova('POST', '/action', **{'os-stop': None})
    until('it stops', lambda: status() == 'SHUTOFF')
    server.nova('POST', '/action', **{'os-start': None})
    until('it starts', lambda: status() == 'ACTIVE')
    server.has(volume, 1, 0)
    server.detach(volume)
    volume.delete()


def a_rebuilt_server_finds_the_volume_again():
    demo = User('demo')
    server = Server.of(demo)
    volume = in_use(demo, server)
    server.nova('POST', '/action', rebuild={'imageRef': demo.cloud.image.find_image('guest').id})
    until('the rebuild begins', lambda: demo.cloud.compute.get_server(server.id).status == 'REBUILD')
    server.is_up()
    server.has(volume, 1, 0)
    server.detach(volume)
    volume.delete()


def nova_compute_is_restarted_while_the_volume_is_in_use():
    demo = User('demo')
    server = Server.of(demo)
    volume = in_use(demo, server)
    servers('down', 'nova-compute')
    assert mapping(volume)
    servers('up')
    compute_is_up()
    server.detach(volume)
    server.attach(volume, had=1)
    server.detach(volume)
    volume.delete()


def a_killed_worker_is_replaced_at_a_hard_reboot():
    demo = User('demo')
    server = Server.of(demo)
    volume = in_use(demo, server)
    os.kill(worker(volume), signal.SIGKILL)
    server.reboots_hard(volume, had=1)
    assert not mapping(volume)['trouble']
    server.detach(volume)
    volume.delete()


def a_volume_whose_worker_was_killed_can_be_detached():
    demo = User('demo')
    server = Server.of(demo)
    volume = in_use(demo, server)
    os.kill(worker(volume), signal.SIGKILL)
    server.detach(volume)
    server.attach(volume, had=1)
    server.detach(volume)
    volume.delete()


def a_deleted_server_leaves_its_volume_free():
    demo = User('demo')
    server = Server.new(demo, 'short-lived')
    volume = in_use(demo, server)
    server.delete()
    volume.settled('available')
    assert not loops(volume)
    server = Server.of(demo)
    server.attach(volume, had=1)
    server.detach(volume)
    volume.delete()


def after_a_crash_another_volume_gets_the_device_and_not_the_data():
    """The mapping of the first volume is still listed, under the name that the second one's has to have."""
    demo = User('demo')
    server = Server.new(demo, 'crashes')
    volume = in_use(demo, server)
    loop, = loops(volume)
    name = User('admin').cloud.compute.get_server(server.id).instance_name
    with open(f'{STATE}/libvirt/run/libvirt/qemu/{name}.pid') as file:
        os.kill(int(file.read()), signal.SIGKILL)
    os.kill(worker(volume), signal.SIGKILL)
    until('the device is free', lambda: not subprocess.run(['losetup', '-d', loop]).returncode and not loops(volume))
    until('Nova sees that the server is off', lambda: demo.cloud.compute.get_server(server.id).status == 'SHUTOFF')
    second = demo.volume()
    fillers = []
    while (free := sh('losetup -f')) != loop:
        assert int(free.removeprefix('/dev/loop')) < int(loop.removeprefix('/dev/loop')), 'somebody else has taken the device'
        fillers.append(sh(f'losetup -f --show {STATE}/first.img'))
    other = Server.of(demo)
    other.attach(second, had=0)
    assert loops(second) == [loop]
    for filler in fillers:
        sh(f'losetup -d {filler}')
    assert mapping(second)['source'] == loop and second.shows_nothing()
    other.detach(second)
    server.nova('POST', '/action', **{'os-start': None})
    server.is_up()
    server.has(volume, 1, 0)
    server.detach(volume)
    server.delete()
    volume.delete()
    second.delete()
