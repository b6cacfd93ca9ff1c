"""neutron.py PORT: answers what Nova asks Neutron about servers without network: there is nothing."""
import http.server
import json
import sys


class Nothing(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        what = self.path.split('?')[0].rstrip('/').rsplit('/', 1)[-1].removesuffix('.json').replace('-', '_')
        if what in ('', 'v2.0'):
            link = {'rel': 'self', 'href': f'http://{self.headers["Host"]}/v2.0/'}
            answer = {'versions': [{'id': 'v2.0', 'status': 'CURRENT', 'links': [link]}]}
        else:
            answer = {what: []}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)


http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Nothing).serve_forever()
