"""Volumes through Cinder and Nova, as a user of one project."""
from cloud import *
from setup import page, types

BLANK_SECTORS = ((1 << 30) - (16 << 20)) // 512


def written(user):
    """A volume on which the guest has written 1."""
    volume = user.volume()
    server = Server.of(user)
    server.attach(volume, had=0)
    server.detach(volume)
    return server, volume


def reads(server, volume, number):
    """The guest finds this number; what it writes is not to be found behind the volume."""
    server.attach(volume, had=number)
    assert volume.shows_nothing()
    server.detach(volume)


def the_operators_page_leads_to_an_attached_volume():
    demo = User('demo')
    server = Server.of(demo)
    types('demo', page('openstack volume create'))
    volume = Volume(demo, demo.cloud.block_storage.find_volume('first').id)
    volume.settled('available')
    assert volume.has_its_key()
    types('demo', page('openstack server add volume').replace('SERVER', 'guest'))
    server.has(volume, 0, 0)
    volume.settled('in-use')
    assert mapping(volume)['volume']
    assert volume.shows_nothing()
    assert verdict(volume) == 'apart'
    server.detach(volume)
    volume.delete()


def a_volume_is_attached_twice_and_grows_while_in_use():
    demo = User('demo')
    volume = demo.volume()
    key = volume.key()
    server = Server.of(demo)
    server.attach(volume, had=0)
    assert server.sectors == BLANK_SECTORS
    server.detach(volume)
    server.attach(volume, had=1)
    seen = len(server.lines(volume))
    volume.action(**{'os-extend': {'new_size': 2}})
    server.has(volume, 2, seen)
    assert server.sectors == BLANK_SECTORS + (1 << 30) // 512, server.sectors
    volume.settled('in-use')
    assert volume.shows_nothing()
    server.detach(volume)
    volume.action(**{'os-extend': {'new_size': 3}})
    volume.settled('available')
    server.attach(volume, had=3)
    assert server.sectors == BLANK_SECTORS + (2 << 30) // 512, server.sectors
    server.detach(volume)
    assert volume.key() == key
    volume.delete()
    assert f'cinder/{key}' not in key_list(), 'the key outlives its volume'


def a_volume_from_a_snapshot_has_a_key_of_its_own():
    demo = User('demo')
    server, volume = written(demo)
    snapshot = demo.snapshot(volume)
    copy = demo.volume(kind=None, snapshot_id=snapshot)
    assert copy.key() != volume.key() and copy.has_its_key()
    reads(server, copy, 1)
    copy.delete()
    reads(server, volume, 1)
    demo.delete('snapshot', snapshot)
    volume.delete()


def a_volume_from_an_image_is_ciphertext():
    demo = User('demo')
    # Where the guest looks, the image has a number.
    image = demo.image(bytes(1 << 20) + (MARKER + b' 7\n') * 20 + bytes(1 << 20))
    volume = demo.volume(imageRef=image)
    assert volume.shows_nothing()
    assert verdict(volume) == 'apart'
    reads(Server.of(demo), volume, 7)
    volume.delete()
    demo.cloud.image.delete_image(image)


def a_backup_is_restored_into_another_encrypted_volume():
    demo = User('demo')
    server, volume = written(demo)
    backup = demo.cinder('POST', '/backups', backup={'volume_id': volume.id, 'name': 'story'})['backup']['id']
    demo.settled('backup', backup, 'available')
    reads(server, volume, 1)
    volume.delete()
    restored = demo.volume()
    demo.cinder('POST', f'/backups/{backup}/restore', restore={'volume_id': restored.id})
    demo.settled('backup', backup, 'available')
    restored.settled('available')
    reads(server, restored, 1)
    restored.delete()
    demo.delete('backup', backup)


def retyping_an_encrypted_volume_to_plain_leaves_its_data():
    demo, admin = User('demo'), User('admin')
    server, volume = written(demo)
    key = volume.key()
    admin.cinder('POST', f'/volumes/{volume.id}/action', **{'os-retype': {'new_type': 'plain', 'migration_policy': 'on-demand'}})
    until('it is of the other type', lambda: volume.details()['volume_type'] == 'plain')
    volume.settled('available')
    assert not volume.key()
    assert f'cinder/{key}' in key_list(), 'Cinder has left it so far'
    server.attach(volume, had=1)
    server.detach(volume)
    volume.delete()


def retyping_a_full_plain_volume_to_encrypted_leaves_it_as_it_was():
    """LUKS2's header takes 16 MiB, so an encrypted volume of the same size is too small. Any LUKS2 has it so."""
    demo, admin = User('demo'), User('admin')
    volume = demo.volume('plain')
    server = Server.of(demo)
    server.attach(volume, had=0)
    server.detach(volume)
    admin.cinder('POST', f'/volumes/{volume.id}/action', **{'os-retype': {'new_type': 'encrypted', 'migration_policy': 'on-demand'}})
    look = lambda: admin.cinder('GET', f'/volumes/{volume.id}')['volume']
    until('the migration ends', lambda: look()['migration_status'] == 'error')
    volume.settled('available')
    assert volume.details()['volume_type'] == 'plain'
    server.attach(volume, had=1)
    server.detach(volume)
    volume.delete()


def a_deleted_volume_takes_its_key_along():
    demo = User('demo')
    volume = demo.volume()
    key = f'cinder/{volume.key()}'
    assert key in key_list()
    volume.delete()
    assert key not in key_list()
