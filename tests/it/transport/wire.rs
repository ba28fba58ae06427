//! A client below gRPC, for requests that no gRPC client would send.

use std::{future::Future, net::SocketAddr};

use bytes::Bytes;
use h2::client::{SendRequest, handshake};
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};
use tokio::net::TcpStream;
use tonic::Status;

/// One HTTP/2 connection.
pub(super) struct Wire(SendRequest<Bytes>);

/// What came back, trailers among the headers.
pub(super) struct Answer {
    pub(super) http: StatusCode,
    pub(super) headers: HeaderMap,
}

impl Answer {
    pub(super) fn status(&self) -> Status {
        let status = Status::from_header_map(&self.headers);
        status.unwrap_or_else(|| panic!("no grpc-status in {:?}", self.headers))
    }
}

impl Wire {
    pub(super) async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("connected");
        let (client, connection) = handshake(stream).await.expect("HTTP/2");
        tokio::spawn(connection);
        Self(client)
    }

    pub(super) async fn call(
        &mut self,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Answer {
        self.start(path, headers, body).await.await
    }

    /// Sends a request; the future that comes back waits for its answer.
    pub(super) async fn start(
        &mut self,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> impl Future<Output = Answer> + use<> {
        let mut request = Request::post(format!("http://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .expect("a request");
        for (name, value) in headers {
            let name: HeaderName = name.parse().expect("a name");
            let value = HeaderValue::from_str(value).expect("ASCII");
            request.headers_mut().insert(name, value);
        }
        let mut client = self.0.clone().ready().await.expect("connected");
        let (answer, mut stream) = client.send_request(request, false).expect("sent");
        // Fails if the head was answered already, as what is refused by it is.
        let _ = stream.send_data(body, true);
        async move {
            let answer = answer.await.expect("an answer");
            let (parts, mut body) = answer.into_parts();
            while let Some(chunk) = body.data().await {
                let length = chunk.expect("a body").len();
                // Without it the server may send no more than a window.
                body.flow_control().release_capacity(length).expect("taken");
            }
            let mut headers = parts.headers;
            headers.extend(body.trailers().await.expect("trailers").unwrap_or_default());
            Answer {
                http: parts.status,
                headers,
            }
        }
    }
}

/// A message as gRPC sends it: not compressed, its length, its bytes.
pub(super) fn frame(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).expect("short").to_be_bytes();
    [&[0][..], &length, message].concat().into()
}
