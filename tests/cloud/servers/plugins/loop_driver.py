"""A Cinder driver whose volumes are files. It says of each that it is an iSCSI target at 127.0.0.20; loop_connector.py
attaches it. No driver of Cinder's own runs in a kernel without iSCSI, NVMe, NFS and device-mapper."""
import os

from cinder import interface
from cinder.image import image_utils
from cinder.volume import driver
from cinder.volume import volume_utils
from oslo_concurrency import processutils
from oslo_config import cfg

OPTIONS = [cfg.StrOpt('loop_folder')]
cfg.CONF.register_opts(OPTIONS, group='backend_defaults')


@interface.volumedriver
class LoopDriver(driver.VolumeDriver):
    VERSION = '1'
    CI_WIKI_NAME = 'none'

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.configuration.append_config_values(OPTIONS)

    def _path(self, thing):
        return os.path.join(self.configuration.loop_folder, thing.name)

    def _copy(self, source, thing):
        processutils.execute('cp', '--sparse=always', source, self._path(thing))

    def _grow(self, volume, gigabytes):
        with open(self._path(volume), 'ab') as file:
            file.truncate(max(gigabytes << 30, file.tell()))

    def check_for_setup_error(self):
        os.makedirs('/dev/disk/by-id', exist_ok=True)

    def get_volume_stats(self, refresh=False):
        return {'volume_backend_name': 'loop', 'vendor_name': 'cryptattach', 'driver_version': self.VERSION,
                'storage_protocol': 'iSCSI', 'total_capacity_gb': 60, 'free_capacity_gb': 60, 'reserved_percentage': 0}

    def create_volume(self, volume):
        self._grow(volume, volume.size)

    def create_volume_from_snapshot(self, volume, snapshot):
        self._copy(self._path(snapshot), volume)
        self._grow(volume, volume.size)

    def create_cloned_volume(self, volume, src_vref):
        self._copy(self._path(src_vref), volume)
        self._grow(volume, volume.size)

    def create_snapshot(self, snapshot):
        processutils.execute('sync', self._path(snapshot.volume))
        self._copy(self._path(snapshot.volume), snapshot)

    def delete_snapshot(self, snapshot):
        os.unlink(self._path(snapshot))

    def delete_volume(self, volume):
        if os.path.exists(self._path(volume)):
            os.unlink(self._path(volume))

    def extend_volume(self, volume, new_size):
        self._grow(volume, new_size)

    def initialize_connection(self, volume, connector):
        return {'driver_volume_type': 'iscsi', 'data': {
            'target_discovered': False, 'target_portal': '127.0.0.20:3260', 'target_lun': 1,
            'target_iqn': f'iqn.2010-10.org.openstack:{volume.name}', 'volume_id': volume.id, 'discard': True,
            'loop_file': self._path(volume)}}

    def terminate_connection(self, volume, connector, **named):
        pass

    def ensure_export(self, context, volume):
        pass

    def create_export(self, context, volume, connector):
        pass

    def remove_export(self, context, volume):
        pass

    def copy_image_to_volume(self, context, volume, image_service, image_id, disable_sparse=False):
        image_utils.fetch_to_raw(context, image_service, image_id, self._path(volume), '1M', size=volume.size,
                                 disable_sparse=disable_sparse)
        self._grow(volume, volume.size)

    def copy_volume_to_image(self, context, volume, image_service, image_meta):
        if volume.encryption_key_id:
            return super().copy_volume_to_image(context, volume, image_service, image_meta)
        volume_utils.upload_volume(context, image_service, image_meta, self._path(volume), volume)
