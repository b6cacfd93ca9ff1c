"""Other places of the keys, and other encryptors."""
import contextlib
import pathlib

from cloud import *
from volumes import reads, written

BARBICAN = '''
[stores.barbican]
type = "barbican"
cloud = "keys"
caller_token = true
'''


def qemu_opens_a_volume_of_type_luks_with_a_key_from_swift():
    """Nova has QEMU open LUKS1 by the key that castellan gets; Cinder gives a clone a key of its own."""
    demo = User('demo')
    volume = demo.volume('luks')
    assert volume.has_its_key()
    server = Server.of(demo)
    server.attach(volume, had=0)
    assert volume.shows_nothing()
    server.detach(volume)
    clone = demo.volume(kind=None, source_volid=volume.id)
    assert clone.key() != volume.key() and clone.has_its_key()
    reads(server, clone, 1)
    reads(server, volume, 1)
    clone.delete()
    volume.delete()


@contextlib.contextmanager
def configured(backend, more):
    """Nova and Cinder with another key manager, and cryptattach with Barbican as its store."""
    files = {path: path.read_text() for path in map(pathlib.Path, (
        f'{STATE}/nova/nova.conf', f'{STATE}/cinder/cinder.conf', os.environ['CRYPTATTACH_CONFIG']))}

    def restart():
        servers('down', 'cinder-api cinder-volume nova-compute')
        servers('up')
        compute_is_up()
        up = lambda: {s['binary'] for s in User('admin').cinder('GET', '/os-services')['services'] if s['state'] == 'up'}
        until('Cinder sees its volume host', lambda: 'cinder-volume' in up())
    try:
        for path, text in files.items():
            text = text.replace('backend = cryptattach\n', f'backend = {backend}\n')
            text = text.replace('default_store = "cinder"', 'default_store = "barbican"').replace('[hooks]', '[hooks]\n' + more)
            path.write_text(text + (BARBICAN if path.suffix == '.toml' else ''))
        restart()
        yield
    finally:
        for path, text in files.items():
            path.write_text(text)
        restart()


def with_barbican(backend, more=''):
    admin, demo = User('admin'), User('demo')
    # Barbican's own plug-in makes AES keys of 256 bits at most.
    kind = next((t for t in admin.cinder('GET', '/types')['volume_types'] if t['name'] == 'short'), None)
    if not kind:
        kind = admin.cinder('POST', '/types', volume_type={'name': 'short'})['volume_type']
        admin.cinder('POST', f'/types/{kind["id"]}/encryption', encryption={
            'provider': 'cryptattach_openstack.encryptor.CryptattachEncryptor', 'cipher': 'aes-xts-plain64', 'key_size': 256,
            'control_location': 'front-end'})
    server = Server.of(demo)
    with configured(backend, more):
        volume = demo.volume('short')
        key = volume.key()
        assert key in secrets(demo) and f'cinder/{key}' not in key_list()
        server.attach(volume, had=0)
        # Nobody can see where Barbican's database is.
        assert verdict(volume) == 'unproven'
        server.detach(volume)
        reads(server, volume, 1)
        volume.delete()
        assert key not in secrets(demo), 'the key outlives its volume'


def secrets(user):
    answer = user.cloud.session.get(f'{os.environ["BARBICAN_URL"]}/v1/secrets?limit=100')
    assert answer.ok, answer.text
    return [secret['secret_ref'].rsplit('/', 1)[1] for secret in answer.json()['secrets']]


def barbican_keeps_the_keys_through_our_driver():
    with_barbican('cryptattach')


def barbican_keeps_the_keys_through_castellans_driver():
    with_barbican('barbican', 'format_with_unmarked_keys = true\n')
