"""Volumes whose keys Cinder copies, before their first attach and after it."""
from cloud import *
from volumes import reads, written


def a_snapshot_before_the_first_attach_costs_neither_volume():
    demo = User('demo')
    volume = demo.volume()
    snapshot = demo.snapshot(volume)
    copy = demo.volume(kind=None, snapshot_id=snapshot)
    assert copy.key() != volume.key()
    server = Server.of(demo)
    reads(server, copy, 0)
    reads(server, volume, 0)
    copy.delete()
    demo.delete('snapshot', snapshot)
    volume.delete()


def a_backup_before_the_first_attach_costs_neither_volume():
    demo = User('demo')
    volume = demo.volume()
    backup = demo.cinder('POST', '/backups', backup={'volume_id': volume.id, 'name': 'story'})['backup']['id']
    demo.settled('backup', backup, 'available')
    server = Server.of(demo)
    reads(server, volume, 0)
    restored = demo.volume()
    demo.cinder('POST', f'/backups/{backup}/restore', restore={'volume_id': restored.id})
    demo.settled('backup', backup, 'available')
    restored.settled('available')
    reads(server, restored, 0)
    restored.delete()
    demo.delete('backup', backup)
    volume.delete()


def a_clone_fails_as_documented_and_leaves_the_volume_usable():
    """Cinder clones what is attached by iSCSI or FC of provider `luks` only."""
    demo = User('demo')
    volume = demo.volume()
    clone = demo.volume(kind=None, source_volid=volume.id, wanted='error')
    clone.delete()
    reads(Server.of(demo), volume, 0)
    volume.delete()


def given(giver, taker, volume):
    transfer = giver.cinder('POST', '/volume-transfers', transfer={'volume_id': volume.id, 'name': 'story'})['transfer']
    taker.cinder('POST', f'/volume-transfers/{transfer["id"]}/accept', accept={'auth_key': transfer['auth_key']})
    theirs = Volume(taker, volume.id)
    theirs.settled('available')
    return theirs


def a_transferred_volume_is_its_new_owners():
    demo, other = User('demo'), User('other')
    _, volume = written(demo)
    key = volume.key()
    theirs = given(demo, other, volume)
    assert theirs.key() != key and theirs.has_its_key() and f'cinder/{key}' not in key_list()
    server = Server.of(other)
    reads(server, theirs, 1)
    theirs.delete()
    server.delete()


def a_transfer_before_the_first_attach_costs_nothing():
    demo, other = User('demo'), User('other')
    theirs = given(demo, other, demo.volume())
    server = Server.of(other)
    reads(server, theirs, 0)
    theirs.delete()
    server.delete()
