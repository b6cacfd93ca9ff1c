"""Volumes through Cinder and Nova, as a user of one project."""
from cloud import *
from setup import page, types


def the_operators_page_leads_to_an_attached_volume():
    demo = User('demo')
    server = Server.of(demo)
    types('demo', page('openstack volume create'))
    volume = Volume(demo, demo.cloud.block_storage.find_volume('first').id)
    volume.settled('available')
    assert volume.has_its_key()
    types('demo', page('openstack server add volume').replace('SERVER', 'guest'))
    server.has(volume, 0, 0)
    assert mapping(volume)
    assert volume.shows_nothing()
    server.detach(volume)
    volume.delete()
