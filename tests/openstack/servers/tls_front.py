"""tls_front.py PORT BEHIND CERTIFICATE: TLS on 127.0.0.1:PORT, passed on in the clear to 127.0.0.1:BEHIND."""
import socket
import ssl
import sys
import threading

port, behind, certificate = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate + '.pem', certificate + '.key')


def pump(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def serve(plain):
    try:
        with context.wrap_socket(plain, server_side=True) as client, \
                socket.create_connection(('127.0.0.1', behind)) as server:
            threading.Thread(target=pump, args=(client, server), daemon=True).start()
            pump(server, client)
    except OSError:  # a client that does not like the certificate
        pass


listener = socket.create_server(('127.0.0.1', port))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
