"""Servers that go from one compute host to another at an operator's word."""
import contextlib

from cloud import *
from hosts import in_use


class SecondHost:
    """Namespaces of this kernel, with a libvirtd, a nova-compute and a cryptattach of its own."""
    name = 'host2'

    def starts(self):
        """And is one on which servers may come: after an evacuation, when it has removed what is elsewhere now."""
        servers('up', self.name)
        until('Nova knows the host', lambda: compute_service(self.name))
        until('Nova takes the host back', lambda: change(self.name, forced_down=False).ok)
        compute_is_up(self.name)

    def loses_power(self):
        """And Nova is told at once: no server comes there."""
        servers('down', self.name)
        assert change(self.name, forced_down=True).ok

    def devices(self, volume):
        """On a volume, by the link that would be udev's."""
        return [os.readlink(link) for link in glob.glob(f'{STATE}/{self.name}/memory/dev/disk/by-path/*{volume.id}*')]

    def mapping(self, volume):
        with open(f'{STATE}/run/{self.name}.pid') as file:
            pid = file.read().split()[0]
        init = sh(f'cat /proc/{pid}/task/{pid}/children')
        return one_mapping(self.devices(volume), inside=f'nsenter -m -t {init}')


def change(host, **values):
    return User('admin').cloud.compute.put(f'/os-services/{compute_service(host).id}', json=values, microversion='2.90')


@contextlib.contextmanager
def second_host():
    """For one story: the others have their servers on the first host."""
    second = SecondHost()
    second.starts()
    try:
        yield second
    finally:
        second.loses_power()


@contextlib.contextmanager
def only_on_the_other():
    """New servers are not for the first host."""
    assert change('host', status='disabled').ok
    try:
        yield
    finally:
        assert change('host', status='enabled').ok


@contextlib.contextmanager
def locked_out(user):
    """Keystone refuses this user's log-in, and the tokens that the user has."""
    admin, token = User('admin').cloud, User(user).cloud.auth_token
    keystone = admin.identity
    user = keystone.find_user(user)
    keystone.update_user(user, is_enabled=False)
    try:
        asked = admin.session.get(f'{os.environ["AUTH_URL"]}/auth/tokens', headers={'X-Subject-Token': token}, raise_exc=False)
        assert asked.status_code == 404, asked.text
        yield
    finally:
        keystone.update_user(user, is_enabled=True)


def migration(server):
    """What has become of the server's migration or evacuation."""
    found = User('admin').nova('GET', f'/os-migrations?instance_uuid={server.id}')['migrations']
    return found[0]['status'] if found else None


def is_on(server, host):
    def look():
        found = server.user.cloud.compute.get_server(server.id)
        assert found.status != 'ERROR' and migration(server) not in ('error', 'failed'), found.fault
        return found.compute_host == host and not found.task_state
    until(f'the server is on {host}', look)


def an_operator_evacuates_a_server_without_the_tenants_token():
    demo, admin = User('demo'), User('admin')
    with second_host() as second:
        with only_on_the_other():
            server = Server.new(demo, 'evacuated')
        volume = in_use(demo, server)
        assert second.mapping(volume)['volume']
        with locked_out('demo'):
            second.loses_power()
            evacuated = Server(admin, server.id)
            evacuated.nova('POST', '/action', evacuate={})
            is_on(evacuated, 'host')
            evacuated.has(volume, 1, 0)
            assert mapping(volume)['volume'] and volume.shows_nothing()
            its = Volume(admin, volume.id)
            assert verdict(its) == 'apart' and record(its)['caller']['user'] == admin.cloud.current_user_id
        # The dead host comes back.
        leftover = f'{STATE}/{second.name}/nova/instances/{server.id}'
        assert os.path.exists(leftover) and migration(server) == 'done'
        second.starts()
        assert migration(server) == 'completed' and not os.path.exists(leftover)
        demo = User('demo')
        server, volume = Server(demo, server.id), Volume(demo, volume.id)
        server.detach(volume)
        server.attach(volume, had=2)
        server.detach(volume)
        server.delete()
        volume.delete()


def a_server_migrates_live_without_the_tenants_token():
    """Its guest goes on, and finds on the other host what it has written on the first."""
    demo, admin = User('demo'), User('admin')
    server = Server.new(demo, 'migrates')
    volume = in_use(demo, server)
    with second_host() as second:
        with locked_out('demo'):
            migrated = Server(admin, server.id)
            migrated.nova('POST', '/action', **{'os-migrateLive': {'host': None, 'block_migration': 'auto'}})
            is_on(migrated, second.name)
            until('the first host lets go of the volume', lambda: not loops(volume))
            assert second.mapping(volume)['volume'] and volume.shows_nothing()
            assert record(Volume(admin, volume.id), host='2')['caller']['user'] == admin.cloud.current_user_id
        demo = User('demo')
        server, volume = Server(demo, server.id), Volume(demo, volume.id)
        seen = len(server.lines(volume))
        volume.action(**{'os-extend': {'new_size': 2}})
        server.has(volume, 1, seen)
        assert not [line for line in server.console() if 'up' in line], 'the guest has booted anew'
        server.detach(volume)
        server.attach(volume, had=2)
        server.detach(volume)
        server.delete()
    volume.delete()
