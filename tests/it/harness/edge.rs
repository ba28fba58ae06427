use std::{
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf, absolute},
    process::{Child, Command, Stdio},
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpSocket, task::JoinHandle};
use tollkeeper::proto::DESCRIPTOR_SET;

use super::eventually;

/// Where those come from who do not say otherwise.
const HOME: [u8; 4] = [127, 0, 0, 1];

/// The real gateway, by the configuration that is delivered, on ports of its own. Killed when dropped.
pub(crate) struct Edge {
    pub(crate) address: SocketAddr,
    child: Child,
    folder: tempfile::TempDir,
}

/// An answer whose body may still come.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    body: Incoming,
    _connection: Connection,
}

/// Ends with its owner, as a client does that hangs up.
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Edge {
    /// Starts it before `upstream`, to ask `tollkeeper` with a service key.
    ///
    /// # Panics
    /// When there is none: a test that needs it must not pass without.
    pub(crate) async fn start(tollkeeper: SocketAddr, key: &str, upstream: SocketAddr) -> Self {
        Self::start_with(tollkeeper, key, upstream, |delivered| delivered).await
    }

    /// As [`Edge::start`], by a configuration that `change` has changed.
    pub(crate) async fn start_with(
        tollkeeper: SocketAddr,
        key: &str,
        upstream: SocketAddr,
        change: impl FnOnce(String) -> String,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let config = folder.path().join("envoy.yaml");
        fs::write(&config, change(configuration(tollkeeper, upstream))).expect("written");
        // As `tollkeeper descriptor` writes it.
        fs::write(folder.path().join("tollkeeper.binpb"), DESCRIPTOR_SET).expect("written");
        let admin = folder.path().join("admin");
        let log = fs::File::create(folder.path().join("log")).expect("a file");
        let binary = binary();
        let child = Command::new(&binary)
            .current_dir(folder.path())
            .env("TOLLKEEPER_GATEWAY_KEY", key)
            .args(["--concurrency", "1", "--disable-hot-restart"])
            .args([
                "--log-level",
                "warning",
                "--component-log-level",
                "misc:error",
            ])
            .arg("--config-path")
            .arg(&config)
            .arg("--admin-address-path")
            .arg(&admin)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| {
                let path = binary.display();
                panic!("no gateway at {path}: {error}; scripts/test installs it")
            });
        let mut edge = Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            child,
            folder,
        };
        let mut found = None;
        eventually("the gateway listens", async || {
            let ended = edge.child.try_wait().expect("a child");
            assert!(ended.is_none(), "it ended: {}", edge.log());
            found = listens_on(&admin).await;
            found.is_some()
        })
        .await;
        edge.address = found.expect("found above");
        edge
    }

    /// What it has complained of.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub(crate) async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.send(Method::GET, path, headers, "").await
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        self.send_from(HOME, method, path, headers, body).await
    }

    /// From another address of this machine.
    pub(crate) async fn send_from(
        &self,
        from: [u8; 4],
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        let answer = send(from, self.address, method, path, headers, body).await;
        answer.expect("answered")
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name);
        let value = value.unwrap_or_else(|| panic!("no {name} in {:?}", self.headers));
        value.to_str().expect("ASCII")
    }

    /// The rest of the body.
    pub(crate) async fn text(self) -> String {
        let body = self.body.collect().await.expect("a whole body").to_bytes();
        String::from_utf8(body.to_vec()).expect("UTF-8")
    }

    pub(crate) async fn json(self) -> serde_json::Value {
        let text = self.text().await;
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("no JSON: {text}"))
    }

    /// Reads until the body has said this.
    pub(crate) async fn read_until(&mut self, what: &str) {
        let mut seen = String::new();
        while !seen.contains(what) {
            let frame = self.body.frame().await;
            let frame = frame.unwrap_or_else(|| panic!("ended after {seen}"));
            if let Some(data) = frame.expect("a frame").data_ref() {
                seen.push_str(&String::from_utf8_lossy(data));
            }
        }
    }
}

async fn get(address: SocketAddr, path: &str) -> Result<Answer, Box<dyn std::error::Error>> {
    send(HOME, address, Method::GET, path, &[], "").await
}

async fn send(
    from: [u8; 4],
    address: SocketAddr,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Result<Answer, Box<dyn std::error::Error>> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((from, 0)))?;
    let stream = socket.connect(address).await?;
    let (mut send, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = Connection(tokio::spawn(async move { drop(connection.await) }));
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "edge.test");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = send
        .send_request(request.body(Full::new(Bytes::copy_from_slice(body.as_bytes())))?)
        .await?;
    let (head, body) = answer.into_parts();
    Ok(Answer {
        status: head.status,
        headers: head.headers,
        body,
        _connection: connection,
    })
}

/// Where its listener is, once it is there.
async fn listens_on(admin: &Path) -> Option<SocketAddr> {
    let admin: SocketAddr = fs::read_to_string(admin).ok()?.trim().parse().ok()?;
    let ready = get(admin, "/ready").await.ok()?;
    if ready.status != StatusCode::OK {
        return None;
    }
    let listeners = get(admin, "/listeners?format=json").await.ok()?;
    let listeners = listeners.json().await;
    let address = &listeners["listener_statuses"][0]["local_address"]["socket_address"];
    let port = u16::try_from(address["port_value"].as_u64()?).ok()?;
    Some(SocketAddr::from(([127, 0, 0, 1], port)))
}

/// What is delivered, with ports that are free.
fn configuration(tollkeeper: SocketAddr, upstream: SocketAddr) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/envoy/envoy.yaml");
    let mut text = fs::read_to_string(path).expect("delivered");
    for (port, own) in [
        (9901, 0),
        (10000, 0),
        (50051, tollkeeper.port()),
        (8080, upstream.port()),
    ] {
        let port = format!("port_value: {port} ");
        assert_eq!(text.matches(&port).count(), 1, "{port}");
        text = text.replace(&port, &format!("port_value: {own} "));
    }
    text.replace("address: 0.0.0.0,", "address: 127.0.0.1,")
}

/// Beside the Python that `scripts/test` makes.
fn binary() -> PathBuf {
    let python = env::var_os("TOLLKEEPER_TEST_PYTHON").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/venv/bin/python"),
        PathBuf::from,
    );
    // It runs in a folder of its own.
    absolute(python.with_file_name("envoy")).expect("a path")
}
