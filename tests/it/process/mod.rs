//! The program as a process of its own: what shows only from outside.

mod certificates;
mod commands;
mod first_start;
mod full_disk;
mod gateway;
mod home;
mod import;
mod import_input;
mod ledger_kills;
mod ledger_load;
mod logs;
mod mail;
mod own_postgres;
mod production;
mod quota_chaos;
mod quota_load;
mod replicas;
mod stop;
mod tiers;
mod upkeep;
mod usage_commands;
mod webhook;

use std::{
    path::PathBuf,
    process::{Child, ExitStatus},
    thread::sleep,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tollkeeper::{
    grpc::probe,
    proto::tollkeeper::auth::v1::{
        GetJwksRequest, GetJwksResponse, auth_service_client::AuthServiceClient,
    },
};
use tonic::transport::{Channel, Endpoint};

/// Far longer than anything takes, also on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// A running `tollkeeper serve`. Killed when dropped.
struct Service {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Service {
    /// Waits for the line of the log that tells the address.
    fn address(&mut self) -> String {
        let mut found = None;
        self.wait_until("it listens", |service| {
            found = listening_address(&service.log());
            found.is_some()
        });
        found.expect("found above")
    }

    /// Waits until health says SERVING.
    async fn serving(&mut self) -> Channel {
        let address = self.address();
        self.serving_at(&address).await
    }

    /// [`Service::serving`] of one whose log is not to be read.
    async fn serving_at(&mut self, address: &str) -> Channel {
        let url = format!("http://{address}");
        let deadline = Instant::now() + DEADLINE;
        while let Err(error) = probe(&url, "", Duration::from_secs(5)).await {
            let ended = self.child.try_wait().expect("a child");
            assert!(ended.is_none(), "{ended:?}: {}", self.log());
            assert!(Instant::now() < deadline, "{error}: {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Endpoint::from_shared(url)
            .expect("an address")
            .connect_lazy()
    }

    /// Waits for a condition that must come before the end of the process.
    fn wait_until(&mut self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self) {
            let ended = self.child.try_wait().expect("a child");
            assert!(ended.is_none(), "ended before {what}: {}", self.log());
            assert!(Instant::now() < deadline, "not {what}: {}", self.log());
            sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, signal).expect("a child that was not yet waited for");
    }

    /// Sends a signal and waits for the end.
    fn stop(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.ended()
    }

    fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(Instant::now() < deadline, "did not end: {}", self.log());
            sleep(Duration::from_millis(5));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.stderr).expect("written by the harness")
    }

    fn output(&self) -> String {
        std::fs::read_to_string(&self.stdout).expect("written by the harness")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The address in `listening address=…` or `"message":"listening","address":"…"`.
fn listening_address(log: &str) -> Option<String> {
    let line = log.lines().find(|line| line.contains("listening"))?;
    let (_, rest) = line.split_once("address")?;
    let rest = rest.trim_start_matches(['=', '"', ':']);
    let end = rest.find([' ', '"']).unwrap_or(rest.len());
    Some(rest[..end].to_owned())
}

async fn jwks(channel: Channel) -> GetJwksResponse {
    let mut auth = AuthServiceClient::new(channel);
    auth.get_jwks(GetJwksRequest {})
        .await
        .expect("answered")
        .into_inner()
}
