"""A castellan driver that keeps keys in cryptattach's stores."""

import base64
import json
import subprocess

from castellan.common import exception
from castellan.common.objects import opaque_data
from castellan.common.objects import passphrase
from castellan.common.objects import private_key
from castellan.common.objects import public_key
from castellan.common.objects import symmetric_key
from castellan.common.objects import x_509
from castellan.key_manager import key_manager

import cryptattach_openstack

# Exit codes of cryptattach that castellan has an exception of its own for.
NO_SUCH_KEY = 67
DENIED = 77

TYPES = {
    'symmetric': symmetric_key.SymmetricKey,
    'private': private_key.PrivateKey,
    'public': public_key.PublicKey,
    'certificate': x_509.X509,
    'passphrase': passphrase.Passphrase,
    'opaque': opaque_data.OpaqueData,
}
NAMES = {cls: name for name, cls in TYPES.items()}
KEYS = ('symmetric', 'private', 'public')


def _kept(cls, slot):
    """A castellan class whose objects fetch their value, which the class has in `slot`, when it is first asked for.

    Whoever has a key's value may use it, and the key counts as used from then on. Cinder copies keys by get and store and never
    looks at the value: such a copy is made inside cryptattach, and the key stays as unused as it was.
    """
    def get(self):
        if self.fetch is not None:
            self._fetched, self.fetch = self.fetch(), None
        return self._fetched

    def put(self, value):
        self._fetched, self.fetch = value, None

    return type(cls.__name__, (cls,), {'__module__': __name__, slot: property(get, put), 'fetch': None, 'auth': None})


KEPT = {name: _kept(cls, '_key' if name in KEYS else '_passphrase' if name == 'passphrase' else '_data')
        for name, cls in TYPES.items()}


class CryptattachKeyManager(key_manager.KeyManager):
    """Keys sealed to their owner, in the store that cryptattach's configuration names."""

    def __init__(self, configuration):
        self._service_user = cryptattach_openstack.ServiceUser(configuration)

    def _auth(self, context):
        return cryptattach_openstack.auth(context, self._service_user)

    def _hook(self, verb, context, key_id=None, **members):
        return self._run(verb, self._auth(context), key_id, **members)

    def _run(self, verb, auth, key_id=None, **members):
        request = {'version': cryptattach_openstack.REQUEST_VERSION, 'auth': auth, **members}
        if key_id is not None:
            request['key_id'] = key_id
        command = cryptattach_openstack.command('key', verb)
        try:
            done = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True)
        except OSError as error:
            raise exception.KeyManagerError(reason=f'cannot run {command[0]}: {error.strerror}')
        if done.returncode == 0:
            return json.loads(done.stdout)
        why = done.stderr.decode(errors='replace').strip()
        if done.returncode == NO_SUCH_KEY:
            raise exception.ManagedObjectNotFoundError(uuid=key_id)
        if done.returncode == DENIED:
            raise exception.Forbidden(why)
        raise exception.KeyManagerError(reason=why)

    @staticmethod
    def _object(described, types=TYPES):
        kind = described['type']
        common = {'name': described['name'], 'created': described['created'], 'id': described['key_id'],
                  'consumers': described.get('consumers', [])}
        value = base64.b64decode(described['value']) if 'value' in described else None
        if kind in KEYS:
            return types[kind](described['algorithm'], described['bit_length'], value, **common)
        return types[kind](value, **common)

    @staticmethod
    def _kind(object_type):
        for cls in object_type.__mro__:
            if cls in NAMES:
                return NAMES[cls]
        raise exception.KeyManagerError(reason=f'Invalid secret type: {object_type}')

    @staticmethod
    def _check_expiration(expiration):
        # Nothing here would heed it.
        if expiration is not None:
            raise exception.KeyManagerError(reason='cryptattach keeps keys until they are deleted: no expiration')

    @staticmethod
    def _check_id(key_id):
        if not key_id:
            raise exception.KeyManagerError(reason='key identifier not provided')

    def create_key(self, context, algorithm, length, expiration=None, name=None, **kwargs):
        """Make a symmetric key; its id."""
        self._check_expiration(expiration)
        return self._hook('create', context, algorithm=algorithm, bit_length=length, name=name)['key_id']

    def create_key_pair(self, context, algorithm, length, expiration=None, name=None):
        """Make a key pair; the ids of the private and of the public key."""
        self._check_expiration(expiration)
        made = self._hook('create-pair', context, algorithm=algorithm, bit_length=length, name=name)
        return made['private_key_id'], made['public_key_id']

    def store(self, context, managed_object, expiration=None):
        """Keep an object; its id."""
        self._check_expiration(expiration)
        if getattr(managed_object, 'fetch', None) is not None:
            # It was got here, and nobody has looked at its value.
            to = self._auth(context)
            return self._run('copy', managed_object.auth, managed_object.id, to=to)['key_id']
        value = managed_object.get_encoded()
        if value is None:
            raise exception.KeyManagerError(reason='Cannot store object without data')
        secret = {
            'type': self._kind(type(managed_object)),
            'algorithm': getattr(managed_object, 'algorithm', None),
            'bit_length': getattr(managed_object, 'bit_length', None),
            'name': managed_object.name,
            'value': base64.b64encode(value).decode(),
        }
        return self._hook('store', context, secret=secret)['key_id']

    def get(self, context, managed_object_id, metadata_only=False):
        """An object, with or without its value."""
        self._check_id(managed_object_id)
        auth = self._auth(context)
        described = self._run('get', auth, managed_object_id, metadata_only=True)
        if metadata_only:
            return self._object(described)
        kept = self._object(described, KEPT)
        kept.auth = auth
        # Who needs it is known already.
        kept.fetch = lambda: base64.b64decode(self._run('get', auth, managed_object_id, consumers=False)['value'])
        return kept

    def delete(self, context, managed_object_id, force=False):
        """Delete an object for ever; one that has consumers only by force."""
        self._check_id(managed_object_id)
        self._hook('delete', context, managed_object_id, force=force)

    def list(self, context, object_type=None, metadata_only=False):
        """All objects, or those of a type."""
        kind = None if object_type is None else self._kind(object_type)
        listed = self._hook('list', context, type=kind, metadata_only=metadata_only)
        return [self._object(described) for described in listed['keys']]

    def add_consumer(self, context, managed_object_id, consumer_data):
        """Note that a resource needs an object: it is not deleted then."""
        def register_consumer(service, resource_type, resource_id):
            consumer = {'service': service, 'resource_type': resource_type, 'resource_id': resource_id}
            self._hook('add-consumer', context, managed_object_id, consumer=consumer)

        self._check_id(managed_object_id)
        register_consumer(**consumer_data)

    def remove_consumer(self, context, managed_object_id, consumer_data):
        """Note that a resource does not need an object any more."""
        def remove_consumer(service, resource_type, resource_id):
            consumer = {'service': service, 'resource_type': resource_type, 'resource_id': resource_id}
            self._hook('remove-consumer', context, managed_object_id, consumer=consumer)

        self._check_id(managed_object_id)
        remove_consumer(**consumer_data)
