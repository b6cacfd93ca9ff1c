"""Create projects, users, roles, the catalogue and an application credential over Keystone's own HTTP API."""
import json
import pathlib
import sys
import urllib.request

state, base, venv, devices = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
ip = '127.0.0.1'
ks, bb, px, ta = (base + n for n in (0, 11, 80, 81))
S = pathlib.Path(state); V3 = f'http://{ip}:{ks}/v3'
pw = lambda u: (S / f'{u}.pw').read_text().strip()
def call(m, p, body=None, tok=None):
    r = urllib.request.Request(V3 + p, method=m, data=json.dumps(body).encode() if body is not None else None,
                               headers={'Content-Type': 'application/json', **({'X-Auth-Token': tok} if tok else {})})
    with urllib.request.urlopen(r, timeout=30) as f:
        d = f.read(); return f.headers, json.loads(d) if d else None
def login(user, project):
    h, d = call('POST', '/auth/tokens', {'auth': {'identity': {'methods': ['password'], 'password': {
        'user': {'name': user, 'domain': {'id': 'default'}, 'password': pw(user)}}},
        'scope': {'project': {'name': project, 'domain': {'id': 'default'}}}}})
    return h['X-Subject-Token'], d['token']
T, _ = login('admin', 'admin')
def ensure(kind, name, **extra):
    q = '' if kind == 'role' else '&domain_id=default' if kind in ('project', 'user') else ''
    found = call('GET', f'/{kind}s?name={name}{q}', None, T)[1][f'{kind}s']
    if found: return found[0]['id']
    return call('POST', f'/{kind}s', {kind: {'name': name, **extra}}, T)[1][kind]['id']
roles = {r: ensure('role', r) for r in ('admin', 'member', 'reader', 'service', 'swiftoperator', 'ResellerAdmin', 'creator')}
proj = {p: ensure('project', p, domain_id='default') for p in ('service', 'keys', 'demo')}
users = {u: ensure('user', u, domain_id='default', password=pw(u)) for u in ('swift', 'barbican', 'cinder', 'nova', 'glance', 'demo')}
def grant(p, u, *rs):
    for r in rs: call('PUT', f'/projects/{proj[p]}/users/{users[u]}/roles/{roles[r]}', None, T)
for u in ('swift', 'barbican', 'cinder', 'nova', 'glance'): grant('service', u, 'service', 'member')
grant('keys', 'cinder', 'swiftoperator', 'member', 'creator')   # owns the Swift account of project "keys"
grant('keys', 'nova', 'member')                                   # sees only what a container ACL gives it
grant('keys', 'glance', 'member')                                 # likewise, and no ACL names it
grant('demo', 'demo', 'member')
for typ, name, url in (('object-store', 'swift', f'http://{ip}:{px}/v1/AUTH_%(project_id)s'),
                       ('key-manager', 'barbican', f'http://{ip}:{bb}')):
    if not call('GET', f'/services?type={typ}', None, T)[1]['services']:
        sid = call('POST', '/services', {'service': {'name': name, 'type': typ}}, T)[1]['service']['id']
        for i in ('public', 'internal', 'admin'):
            call('POST', '/endpoints', {'endpoint': {'service_id': sid, 'interface': i, 'url': url, 'region_id': 'RegionOne'}}, T)
ct, ctok = login('cinder', 'keys')
old = [c for c in call('GET', f"/users/{users['cinder']}/application_credentials", None, ct)[1]['application_credentials']]
for c in old: call('DELETE', f"/users/{users['cinder']}/application_credentials/{c['id']}", None, ct)
ac = call('POST', f"/users/{users['cinder']}/application_credentials", {'application_credential': {
    'name': 'cryptattach', 'roles': [{'name': 'swiftoperator'}, {'name': 'member'}, {'name': 'creator'}], 'unrestricted': False}}, ct)[1]['application_credential']
env = dict(AUTH_URL=V3, SWIFT_URL=f'http://{ip}:{px}', TEMPAUTH_URL=f'http://{ip}:{ta}', BARBICAN_URL=f'http://{ip}:{bb}',
           TLS_AUTH_URL=f'https://{ip}:{base + 100}/v3', WRONG_TLS_AUTH_URL=f'https://{ip}:{base + 101}/v3',
           CA_FILE=f'{state}/tls/ca.pem', APP_CREDENTIAL_ID=ac['id'], APP_CREDENTIAL_SECRET=ac['secret'],
           STATE=state, VENV=venv, DEVICES=devices,
           **{f'PASSWORD_{u.upper()}': pw(u) for u in ('admin', *users)},
           **{f'USER_ID_{u.upper()}': i for u, i in users.items()},
           **{f'PROJECT_ID_{p.upper()}': i for p, i in proj.items()})
p = S / 'env.new'
p.touch(0o600)
p.write_text(''.join(f'{k}={v}\n' for k, v in env.items()))
p.rename(S / 'env')
