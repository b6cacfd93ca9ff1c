"""Not a story: what each cloud has before its first users come. The volume type is the page's."""
import os
import shlex

from cloud import User, compute_is_up, sh


def page(beginning):
    """The page's command that begins so."""
    text = os.environ['PAGE'].replace('\\\n', ' ')
    found = [line for line in text.splitlines() if line.startswith(beginning)]
    assert len(found) == 1, (beginning, text)
    return found[0]


def types(cloud, command):
    """Somebody types a command of the page."""
    clouds, venv = os.environ['OPERATORS_CLOUDS'], os.environ['VENV']
    return sh(f'OS_CLIENT_CONFIG_FILE={clouds} OS_CLOUD={cloud} PATH={venv}/bin:$PATH {command}')


def prepare():
    admin = User('admin')
    for name in ('demo', 'other'):
        project = admin.cloud.identity.find_project(name).id
        admin.cinder('PUT', f'/os-quota-sets/{project}', quota_set={'volumes': 100, 'gigabytes': 1000, 'snapshots': 100})
    plain, luks = (admin.cinder('POST', '/types', volume_type={'name': name})['volume_type']['id'] for name in ('plain', 'luks'))
    admin.cinder('POST', f'/types/{luks}/encryption', encryption={
        'provider': 'luks', 'cipher': 'aes-xts-plain64', 'key_size': 256, 'control_location': 'front-end'})
    types('admin', page('openstack volume type create'))
    images = {}
    for name, kind, file in (('kernel', 'aki', 'kernel'), ('initrd', 'ari', 'initrd'), ('guest', 'raw', 'disk')):
        more = {} if kind != 'raw' else dict(kernel_id=images['kernel'], ramdisk_id=images['initrd'], hw_disk_bus='virtio',
                                             os_command_line='console=ttyS0 quiet no_timer_check')
        image = admin.cloud.image.create_image(name=name, disk_format=kind, visibility='public',
                                               container_format=kind if kind != 'raw' else 'bare', **more)
        with open(f'{os.environ["GUEST"]}/{file}', 'rb') as data:
            sent = admin.cloud.image.put(f'/images/{image.id}/file', data=data, headers={'Content-Type': 'application/octet-stream'})
        assert sent.ok, sent.text
        images[name] = image.id
    admin.cloud.compute.create_flavor(name='tiny', ram=160, vcpus=1, disk=1)
    compute_is_up()
