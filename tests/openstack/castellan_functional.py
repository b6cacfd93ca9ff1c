"""Castellan's own functional tests, "should pass against any key manager", against our driver. Environment: TOKEN."""
import json
import os
import unittest
from unittest import mock

from castellan.common import exception
from castellan.common.credentials import keystone_password
from castellan.common.credentials import keystone_token
from castellan.common.credentials import token
from castellan.common.objects import managed_object
from castellan.common.objects import symmetric_key
from castellan.tests import utils
from castellan.tests.functional.key_manager import test_key_manager
from keystoneauth1 import loading
from oslo_config import cfg
from oslo_context import context
from oslo_utils import uuidutils
from oslotest import base

from cryptattach_openstack import key_manager


@utils.parameterized_test_case
class CryptattachTestCase(test_key_manager.KeyManagerTestCase, base.BaseTestCase):
    def _create_key_manager(self):
        return key_manager.CryptattachKeyManager(cfg.CONF)

    def setUp(self):
        super().setUp()
        self.ctxt = context.RequestContext(auth_token=os.environ['TOKEN'], project_id=os.environ['PROJECT_ID_KEYS'])

    # What castellan's Barbican test case adds for errors.
    def test_null_context(self):
        key = test_key_manager._get_test_symmetric_key()
        for call in (lambda: self.key_mgr.create_key(None, 'AES', 256),
                     lambda: self.key_mgr.create_key_pair(None, 'RSA', 2048),
                     lambda: self.key_mgr.store(None, key),
                     lambda: self.key_mgr.get(None, uuidutils.generate_uuid()),
                     lambda: self.key_mgr.delete(None, uuidutils.generate_uuid())):
            self.assertRaises(exception.Forbidden, call)

    def test_null_object(self):
        self.assertRaises(exception.KeyManagerError, self.key_mgr.get, self.ctxt, None)
        self.assertRaises(exception.KeyManagerError, self.key_mgr.delete, self.ctxt, None)

    def test_unknown_object(self):
        unknown = uuidutils.generate_uuid()
        self.assertRaises(exception.ManagedObjectNotFoundError, self.key_mgr.get, self.ctxt, unknown)
        self.assertRaises(exception.ManagedObjectNotFoundError, self.key_mgr.delete, self.ctxt, unknown)

    def test_context_without_token(self):
        nobody = context.RequestContext(project_id=os.environ['PROJECT_ID_KEYS'])
        error = self.assertRaises(exception.Forbidden, self.key_mgr.create_key, nobody, 'AES', 256)
        self.assertIn('without a token', str(error))

    def test_password(self):
        def password(**members):
            return keystone_password.KeystonePassword(**{
                'auth_url': os.environ['AUTH_URL'], 'username': 'cinder', 'password': os.environ['PASSWORD_CINDER'],
                'user_domain_id': 'default', 'project_name': 'keys', 'project_domain_id': 'default', **members})

        self.key_mgr.delete(password(), self.key_mgr.create_key(password(), 'AES', 256))
        for wrong, refusal, says in (({'password': 'x'}, exception.Forbidden, 'refuses the log-in of cinder'),
                                     ({'auth_url': None}, exception.Forbidden, 'auth_url'),
                                     ({'auth_url': 'http://127.0.0.1:1/v3'}, exception.KeyManagerError, 'cannot ask')):
            error = self.assertRaises(refusal, self.key_mgr.create_key, password(**wrong), 'AES', 256)
            self.assertIn(says, str(error))

    def test_value_is_fetched_when_it_is_asked_for(self):
        key = self.key_mgr.create_key(self.ctxt, 'AES', 256)
        self.addCleanup(self.key_mgr.delete, self.ctxt, key)
        run = mock.patch.object(key_manager.subprocess, 'run', wraps=key_manager.subprocess.run)
        with run as run:
            got = self.key_mgr.get(self.ctxt, key)
            self.assertEqual((256, key), (got.bit_length, got.id))
            self.assertTrue(json.loads(run.call_args.kwargs['input'])['metadata_only'])
            self.assertEqual(1, run.call_count)
            self.assertEqual(32, len(got.get_encoded()))
            self.assertIs(got.get_encoded(), got.get_encoded())
            self.assertEqual(2, run.call_count)
        self.key_mgr.delete(self.ctxt, self.key_mgr.store(self.ctxt, got))
        # It was deleted meanwhile.
        gone = self.key_mgr.create_key(self.ctxt, 'AES', 256)
        got = self.key_mgr.get(self.ctxt, gone)
        self.key_mgr.delete(self.ctxt, gone)
        self.assertRaises(exception.ManagedObjectNotFoundError, got.get_encoded)
        self.assertRaises(exception.ManagedObjectNotFoundError, self.key_mgr.store, self.ctxt, got)

    def test_castellans_own_tokens(self):
        for credential in (token.Token(os.environ['TOKEN']), keystone_token.KeystoneToken(os.environ['TOKEN'])):
            self.key_mgr.delete(credential, self.key_mgr.create_key(credential, 'AES', 256))
        # The token is used, not the service's own login, where the store is configured so.
        if 'CALLER_TOKEN' in os.environ:
            self.assertRaises(exception.Forbidden, self.key_mgr.create_key, token.Token('stale'), 'AES', 256)

    def test_missing_program(self):
        with mock.patch.dict(os.environ, {'CRYPTATTACH': '/nonexistent'}):
            error = self.assertRaises(exception.KeyManagerError, self.key_mgr.create_key, self.ctxt, 'AES', 256)
        self.assertIn('/nonexistent', str(error))

    def test_expiration(self):
        key = test_key_manager._get_test_symmetric_key()
        for call in (lambda: self.key_mgr.create_key(self.ctxt, 'AES', 256, expiration='2030-01-01T00:00:00'),
                     lambda: self.key_mgr.create_key_pair(self.ctxt, 'RSA', 2048, expiration='2030-01-01T00:00:00'),
                     lambda: self.key_mgr.store(self.ctxt, key, expiration='2030-01-01T00:00:00')):
            self.assertIn('expiration', str(self.assertRaises(exception.KeyManagerError, call)))

    def test_subclass(self):
        class Own(symmetric_key.SymmetricKey):
            pass

        class Other(managed_object.ManagedObject):
            format = get_encoded = managed_type = lambda self: b'x'

        stored = self.key_mgr.store(self.ctxt, Own('AES', 256, bytes(32)))
        self.addCleanup(self.key_mgr.delete, self.ctxt, stored)
        self.assertIsInstance(self.key_mgr.get(self.ctxt, stored), symmetric_key.SymmetricKey)
        self.assertRaises(exception.KeyManagerError, self.key_mgr.store, self.ctxt, Other())
        self.assertRaises(exception.KeyManagerError, self.key_mgr.list, self.ctxt, Other)

    def test_consumers(self):
        stored = self.key_mgr.store(self.ctxt, test_key_manager._get_test_symmetric_key())
        consumers = [{'service': 'cinder', 'resource_type': 'volume', 'resource_id': number} for number in '12']
        self.assertEqual([], self.key_mgr.get(self.ctxt, stored).consumers)
        for consumer in consumers:
            self.key_mgr.add_consumer(self.ctxt, stored, consumer)
        self.key_mgr.add_consumer(self.ctxt, stored, consumers[0])
        self.assertCountEqual(consumers, self.key_mgr.get(self.ctxt, stored, metadata_only=True).consumers)
        error = self.assertRaises(exception.KeyManagerError, self.key_mgr.delete, self.ctxt, stored)
        self.assertIn('cinder volume 1; cinder volume 2', str(error))
        self.key_mgr.remove_consumer(self.ctxt, stored, consumers[0])
        self.assertEqual(consumers[1:], self.key_mgr.get(self.ctxt, stored).consumers)
        self.assertRaises(exception.ManagedObjectNotFoundError, self.key_mgr.remove_consumer, self.ctxt, stored, consumers[0])
        self.assertRaises(TypeError, self.key_mgr.add_consumer, self.ctxt, stored, {'service': 'cinder'})
        unknown = uuidutils.generate_uuid()
        self.assertRaises(exception.ManagedObjectNotFoundError, self.key_mgr.add_consumer, self.ctxt, unknown, consumers[0])
        self.key_mgr.delete(self.ctxt, stored, force=True)
        self.assertRaises(exception.ManagedObjectNotFoundError, self.key_mgr.get, self.ctxt, stored)

    def test_service_token(self):
        own = cfg.ConfigOpts()
        own([], project='cryptattach-test', default_config_files=[])
        manager = key_manager.CryptattachKeyManager(own)
        manager.delete(self.ctxt, manager.create_key(self.ctxt, 'AES', 256))
        own.set_override('send_service_user_token', True, group='barbican')
        self.assertRaises(exception.Forbidden, manager.create_key, self.ctxt, 'AES', 256)
        loading.register_auth_conf_options(own, 'barbican_service_user')
        own.set_override('auth_type', 'password', group='barbican_service_user')
        own.register_opts(loading.get_auth_plugin_conf_options('password'), group='barbican_service_user')
        for name, value in (('auth_url', os.environ['AUTH_URL']), ('username', 'glance'), ('project_name', 'service'),
                            ('password', os.environ['PASSWORD_GLANCE']), ('user_domain_id', 'default'),
                            ('project_domain_id', 'default')):
            own.set_override(name, value, group='barbican_service_user')
        with mock.patch.object(key_manager.subprocess, 'run', wraps=key_manager.subprocess.run) as run:
            manager.delete(self.ctxt, manager.create_key(self.ctxt, 'AES', 256))
        sent = json.loads(run.call_args_list[0].kwargs['input'])['auth']
        self.assertEqual(os.environ['TOKEN'], sent['token'])
        self.assertNotIn(sent['service_token'], (None, sent['token']))


if __name__ == '__main__':
    unittest.main(verbosity=2)
