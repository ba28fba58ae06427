//! A real Envoy with a listener for each of what is compared.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use crate::{cores, process::cpu_of};

const START_DEADLINE: Duration = Duration::from_secs(30);
const HTTP: &str = "type.googleapis.com/envoy.extensions.filters.http";
const HTTP2: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// Dropping it ends it.
pub(super) struct Gateway {
    /// Lets all pass.
    pub(super) plain: SocketAddr,
    /// Asks the no-op.
    pub(super) noop: SocketAddr,
    /// Asks the service.
    pub(super) service: SocketAddr,
    child: Child,
}

/// Who is behind it.
pub(super) struct Behind {
    pub(super) app: SocketAddr,
    pub(super) noop: SocketAddr,
    pub(super) service: SocketAddr,
}

impl Gateway {
    pub(super) fn start(
        program: &Path,
        folder: &Path,
        key: &str,
        behind: &Behind,
    ) -> anyhow::Result<Self> {
        // Held together, so that they differ, and free again.
        let ports: Vec<_> = (0..3)
            .map(|_| TcpListener::bind("127.0.0.1:0"))
            .collect::<Result<_, _>>()?;
        let addresses: Vec<_> = ports
            .iter()
            .map(TcpListener::local_addr)
            .collect::<Result<_, _>>()?;
        let [plain, noop, service] = addresses[..] else {
            bail!("three addresses");
        };
        drop(ports);
        let config = json!({
            "static_resources": {
                "listeners": [
                    listener("plain", plain, None, key),
                    listener("noop", noop, Some("noop"), key),
                    listener("service", service, Some("service"), key),
                ],
                "clusters": [
                    cluster("app", behind.app),
                    cluster("noop", behind.noop),
                    cluster("service", behind.service),
                ],
            },
        });
        let (path, log) = (folder.join("envoy.json"), folder.join("envoy.log"));
        fs::write(&path, config.to_string())?;
        // Should this process be killed, it ends too.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "--"])
            .arg(program)
            .args(["--disable-hot-restart", "--log-level", "warning"])
            .args(["--concurrency", &cores().to_string()])
            .arg("--config-path")
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("cannot start the gateway by setpriv")?;
        let mut gateway = Self {
            plain,
            noop,
            service,
            child,
        };
        let begun = Instant::now();
        while addresses
            .iter()
            .any(|address| TcpStream::connect(address).is_err())
        {
            let is_late = begun.elapsed() > START_DEADLINE;
            let has_ended = gateway.child.try_wait()?.is_some();
            ensure!(
                !is_late && !has_ended,
                "the gateway does not listen:\n{}",
                fs::read_to_string(&log)?
            );
            sleep(Duration::from_millis(20));
        }
        Ok(gateway)
    }

    pub(super) fn cpu(&self) -> anyhow::Result<Duration> {
        cpu_of(&format!("/proc/{}/stat", self.child.id()))
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socket(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

fn cluster(name: &str, address: SocketAddr) -> Value {
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": { HTTP2: {
            "@type": format!("type.googleapis.com/{HTTP2}"),
            "explicit_http_config": {"http2_protocol_options": {}},
        }},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket(address)}}]}],
        },
    })
}

/// A listener whose filters, if any, ask a cluster; as deploy/envoy/envoy.yaml has them.
fn listener(name: &str, address: SocketAddr, asks: Option<&str>, key: &str) -> Value {
    let filter = |name: &str, mut config: Value, message: &str| {
        config["@type"] = format!("{HTTP}.{name}.v3.{message}").into();
        json!({"name": format!("envoy.filters.http.{name}"), "typed_config": config})
    };
    let mut filters = Vec::new();
    let mut route = json!({"match": {"prefix": "/"}, "route": {"cluster": "app"}});
    if let Some(cluster) = asks {
        let asked = json!({
            "envoy_grpc": {"cluster_name": cluster},
            "timeout": "2s",
            "initial_metadata": [{"key": "authorization", "value": format!("Bearer {key}")}],
        });
        let authorization = json!({"transport_api_version": "V3", "grpc_service": asked});
        let limit = json!({
            "domain": "bench",
            "timeout": "2s",
            "failure_mode_deny": true,
            "rate_limit_service": {"transport_api_version": "V3", "grpc_service": asked},
        });
        filters.push(filter("ext_authz", authorization, "ExtAuthz"));
        filters.push(filter("ratelimit", limit, "RateLimit"));
        let user = json!({"key": "envoy.filters.http.ext_authz", "path": [{"key": "user_id"}]});
        let actions = json!([
            {"generic_key": {"descriptor_key": "op", "descriptor_value": "check"}},
            {"metadata": {
                "descriptor_key": "user",
                "default_value": "__missing__",
                "metadata_key": user,
            }},
        ]);
        route["typed_per_filter_config"] = json!({"envoy.filters.http.ratelimit": {
            "@type": format!("{HTTP}.ratelimit.v3.RateLimitPerRoute"),
            "rate_limits": [{"hits_addend": {"number": super::TOKENS}, "actions": actions}],
        }});
    }
    filters.push(filter("router", json!({}), "Router"));
    let manager = "envoy.extensions.filters.network.http_connection_manager.v3";
    json!({
        "name": name,
        "address": socket(address),
        "filter_chains": [{"filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": {
                "@type": format!("type.googleapis.com/{manager}.HttpConnectionManager"),
                "stat_prefix": name,
                "codec_type": "HTTP2",
                "use_remote_address": true,
                "http_filters": filters,
                "route_config": {"virtual_hosts": [
                    {"name": "all", "domains": ["*"], "routes": [route]},
                ]},
            },
        }]}],
    })
}
