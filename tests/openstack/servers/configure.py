"""configure.py STATE DEVICES PORT_BASE: every server's configuration below STATE. No secret is fixed: all are drawn here."""
import base64
import getpass
import os
import pathlib
import secrets
import sys
import textwrap

state, devs, base = sys.argv[1], sys.argv[2], int(sys.argv[3])
# As operators run Swift, for measurements: with its stock time limits, and with a cache in the proxy
stock = 'CRYPTATTACH_OS_STOCK' in os.environ
ip = '127.0.0.1'
ks, bb, px, ta, con, acc, obj = (base + n for n in (0, 11, 80, 81, 201, 202, 210))
S = pathlib.Path(state)
def w(path, text, mode=0o600):
    p = S / path; p.parent.mkdir(parents=True, exist_ok=True)
    p.write_text(textwrap.dedent(text).lstrip('\n')); p.chmod(mode)
user = getpass.getuser()
pw = {u: secrets.token_hex(12) for u in ('admin', 'swift', 'barbican', 'cinder', 'nova', 'glance', 'demo')}
for u, p in pw.items(): w(f'{u}.pw', p + '\n')
ks_url = f'http://{ip}:{ks}'

w('keystone/keystone.conf', f'''
    [DEFAULT]
    use_stderr = true
    [database]
    connection = sqlite:///{S}/keystone/keystone.sqlite
    [token]
    provider = fernet
    [fernet_tokens]
    key_repository = {S}/keystone/fernet
    [fernet_receipts]
    key_repository = {S}/keystone/fernet
    [credential]
    key_repository = {S}/keystone/credential
    [identity]
    # test servers only: bcrypt's floor, so that a password login costs 2 ms and not 250 ms
    password_hash_rounds = 4
    max_password_length = 72
    # one process, so an in-process cache is coherent; without any, each token validation costs 0.5 s of sqlite opens
    [cache]
    enabled = true
    backend = oslo_cache.dict
    [oslo_policy]
    enforce_scope = true
    enforce_new_defaults = true
''')
for d in ('fernet', 'credential'): (S / 'keystone' / d).mkdir(mode=0o700, exist_ok=True)

authtoken = lambda u, svc: f'''
    auth_type = password
    auth_url = {ks_url}
    www_authenticate_uri = {ks_url}
    project_name = service
    project_domain_id = default
    user_domain_id = default
    username = {u}
    password = {pw[u]}
    region_name = RegionOne
    service_token_roles_required = true
    service_token_roles = service
    # lets application credentials' access rules be enforced
    service_type = {svc}
'''
# ---------------------------------------------------------------- swift
sw = S / 'swift'
devices = pathlib.Path(devs)
for i in (1, 2, 3): (devices / f'sdb{i}').mkdir(parents=True, exist_ok=True)
w('swift/swift.conf', f'''
    [swift-hash]
    swift_hash_path_prefix = {secrets.token_hex(8)}
    swift_hash_path_suffix = {secrets.token_hex(8)}
    [storage-policy:0]
    name = Policy-0
    default = yes
''')
common = lambda port, ip=ip: f'''
    [DEFAULT]
    bind_ip = {ip}
    bind_port = {port}
    workers = 0
    user = {user}
    swift_dir = {sw}
    devices = {devices}
    mount_check = false
    fallocate_reserve = 0
    disable_fallocate = true
    log_level = INFO
    # nobody listens there; without it Swift looks up "localhost" for its syslog, which a bare machine may not know
    log_udp_host = 127.0.0.1
'''
for kind, port in (('account', acc), ('container', con)):
    w(f'swift/{kind}.conf', common(port, '127.0.0.10') + f'''
    [pipeline:main]
    pipeline = healthcheck recon {kind}-server
    [app:{kind}-server]
    use = egg:swift#{kind}
    [filter:healthcheck]
    use = egg:swift#healthcheck
    [filter:recon]
    use = egg:swift#recon
    recon_cache_path = {sw}/cache/{kind}
    ''')
for i in (1, 2, 3):
    w(f'swift/object{i}.conf', common(obj, f'127.0.0.1{i}') + f'''
    [pipeline:main]
    pipeline = healthcheck recon object-server
    [app:object-server]
    use = egg:swift#object
    [filter:healthcheck]
    use = egg:swift#healthcheck
    [filter:recon]
    use = egg:swift#recon
    recon_cache_path = {sw}/cache/object{i}
    ''')
impatience = '''
    # a stopped object server must be noticed in a test's time, not an operator's
    conn_timeout = 0.5
    node_timeout = 2
    recoverable_node_timeout = 1
    # stock: a device that answered 507 or erred 10 times is not asked again for 60 s, even once it is back
    error_suppression_interval = 0
'''.strip()
proxy_tail = f'''
    [app:proxy-server]
    use = egg:swift#proxy
    account_autocreate = true
    allow_account_management = true
    {"" if stock else impatience}
    [filter:catch_errors]
    use = egg:swift#catch_errors
    [filter:gatekeeper]
    use = egg:swift#gatekeeper
    [filter:healthcheck]
    use = egg:swift#healthcheck
    [filter:proxy-logging]
    use = egg:swift#proxy_logging
    [filter:list-endpoints]
    use = egg:swift#list_endpoints
    [filter:tempurl]
    use = egg:swift#tempurl
    [filter:copy]
    use = egg:swift#copy
    [filter:slo]
    use = egg:swift#slo
    [filter:dlo]
    use = egg:swift#dlo
    [filter:versioned_writes]
    use = egg:swift#versioned_writes
    allow_versioned_writes = true
    allow_object_versioning = true
    [filter:symlink]
    use = egg:swift#symlink
    [filter:bulk]
    use = egg:swift#bulk
    [filter:one_process_cache]
    paste.filter_factory = one_process_cache:filter_factory
'''
proxy_head = lambda port: f'''
    [DEFAULT]
    bind_ip = {ip}
    bind_port = {port}
    workers = 0
    user = {user}
    swift_dir = {sw}
    log_level = INFO
    # nobody listens there; without it Swift looks up "localhost" for its syslog, which a bare machine may not know
    log_udp_host = 127.0.0.1
'''
tail = 'copy slo dlo versioned_writes symlink proxy-logging proxy-server'
w('swift/proxy.conf', proxy_head(px) + f'''
    [pipeline:main]
    pipeline = catch_errors gatekeeper healthcheck proxy-logging one_process_cache list-endpoints bulk tempurl authtoken keystoneauth {tail}
    [filter:authtoken]
    paste.filter_factory = keystonemiddleware.auth_token:filter_factory
    delay_auth_decision = true
    {"cache = swift.cache" * stock}
    {authtoken('swift', 'object-store').strip()}
    [filter:keystoneauth]
    use = egg:swift#keystoneauth
    operator_roles = admin, swiftoperator
    reseller_prefix = AUTH
    reseller_admin_role = ResellerAdmin
    system_reader_roles = 
''' + proxy_tail)
w('swift/tempauth.conf', proxy_head(ta) + f'''
    [pipeline:main]
    pipeline = catch_errors gatekeeper healthcheck proxy-logging one_process_cache list-endpoints bulk tempurl tempauth {tail}
    [filter:tempauth]
    use = egg:swift#tempauth
    reseller_prefix = TEMP
    # user_<account>_<user> = <key> [groups]
    user_keys_cinder = {pw['cinder']} .admin
    user_keys_nova = {pw['nova']}
    user_other_swift = {pw['swift']} .admin
    storage_url_scheme = http
''' + proxy_tail)
w('swift/one_process_cache.py', '''
    """An in-process stand-in for memcached, which Swift is never run without, for a one-process proxy: what it knows of accounts
    and containers, else asked for at each request, and tempauth's tokens."""
    import time
    class Cache:
        def __init__(self): self.d = {}
        def get(self, key, raise_on_error=False):
            v = self.d.get(key)
            if v is None: return None
            if v[1] and v[1] < time.time(): self.d.pop(key, None); return None
            return v[0]
        def set(self, key, value, serialize=True, time=0, min_compress_len=0, raise_on_error=False):
            import time as t
            self.d[key] = (value, t.time() + time if time else 0)
        def incr(self, key, delta=1, time=0):
            v = max(0, (self.get(key) or 0) + delta); self.set(key, v, time=time); return v
        def delete(self, key, server_key=None): self.d.pop(key, None)
    def filter_factory(conf, **local):
        cache = Cache()
        def wrap(app):
            def call(env, start):
                env['swift.cache'] = cache
                return app(env, start)
            return call
        return wrap
''')
# ---------------------------------------------------------------- barbican
kek = base64.b64encode(secrets.token_bytes(32)).decode()
w('barbican/.barbican/barbican.conf', f'''
    [DEFAULT]
    host_href = http://{ip}:{bb}
    db_auto_create = true
    use_stderr = true
    [database]
    connection = sqlite:///{S}/barbican/barbican.sqlite
    [queue]
    # orders are then processed inside the API process, synchronously: no worker, no message bus
    enable = false
    [secretstore]
    enabled_secretstore_plugins = store_crypto
    [crypto]
    enabled_crypto_plugins = simple_crypto
    [simple_crypto_plugin]
    kek = {kek}
    [keystone_authtoken]
    {"cache = swift.cache" * stock}
    {authtoken('barbican', 'key-manager').strip()}
''')
w('barbican/paste.ini', f'''
    [composite:main]
    use = egg:Paste#urlmap
    /: version
    /v1: v1
    [pipeline:version]
    pipeline = request_id microversion versionapp
    [pipeline:v1]
    pipeline = request_id {"one_process_cache " * stock}authtoken context microversion apiapp
    [app:apiapp]
    paste.app_factory = barbican.api.app:create_main_app
    [app:versionapp]
    paste.app_factory = barbican.api.app:create_version_app
    [filter:request_id]
    paste.filter_factory = oslo_middleware.request_id:RequestId.factory
    [filter:context]
    paste.filter_factory = barbican.api.middleware.context:ContextMiddleware.factory
    [filter:microversion]
    paste.filter_factory = barbican.api.middleware.microversion:MicroversionMiddleware.factory
    [filter:authtoken]
    paste.filter_factory = keystonemiddleware.auth_token:filter_factory
    [filter:one_process_cache]
    paste.filter_factory = one_process_cache:filter_factory
''')
w('barbican/barbican_app.py', f'''
    from paste import deploy
    application = deploy.loadapp('config:{S}/barbican/paste.ini', name='main')
''')
