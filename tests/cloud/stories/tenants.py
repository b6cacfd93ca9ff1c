"""One project's user, and the keys of another project."""
from cloud import *


def an_image_that_names_another_projects_key_gets_no_copy_of_it():
    demo, other = User('demo'), User('other')
    victim = demo.volume()
    before = key_list()
    image = other.image(bytes(1 << 20), cinder_encryption_key_id=victim.key(),
                        cinder_encryption_key_deletion_policy='do_not_delete')
    made = other.cinder('POST', '/volumes', volume={'size': 1, 'volume_type': 'encrypted', 'imageRef': image}, expect=500)
    assert not made
    assert key_list() == before
    other.cloud.image.delete_image(image)
    victim.delete()


def an_image_that_names_another_projects_key_does_not_delete_it():
    demo, other = User('demo'), User('other')
    victim = demo.volume()
    image = other.image(bytes(1 << 20), cinder_encryption_key_id=victim.key(),
                        cinder_encryption_key_deletion_policy='on_image_deletion')
    # Glance asks castellan for the deletion before it answers.
    other.cloud.image.delete_image(image)
    assert victim.has_its_key()
    server = Server.of(demo)
    server.attach(victim, had=0)
    server.detach(victim)
    victim.delete()
