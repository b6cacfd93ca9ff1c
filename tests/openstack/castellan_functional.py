"""Castellan's own functional tests, "should pass against any key manager", against our driver. Environment: TOKEN."""
import os
import unittest

from castellan.common import exception
from castellan.tests import utils
from castellan.tests.functional.key_manager import test_key_manager
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
        self.ctxt = context.RequestContext(auth_token=os.environ['TOKEN'], project_id='keys')

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


if __name__ == '__main__':
    unittest.main(verbosity=2)
