//! `grpc.health.v1`: follows the database, and a probe that asks it.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::{Code, transport::Endpoint};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_check_response, health_client::HealthClient},
    server::HealthReporter,
};
use tracing::{info, warn};

use crate::proto::tollkeeper;

/// How often the database is asked, and how long it may take to answer.
const PERIOD: Duration = Duration::from_secs(1);

/// The names health is reported under: the server as a whole and each service.
const SERVICES: [&str; 4] = [
    "",
    tollkeeper::auth::v1::auth_service_server::SERVICE_NAME,
    tollkeeper::usage::v1::usage_service_server::SERVICE_NAME,
    tollkeeper::admin::v1::admin_service_server::SERVICE_NAME,
];

/// Sets every service's status.
pub async fn report(reporter: &HealthReporter, serving: bool) {
    let status = if serving {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    };
    for service in SERVICES {
        reporter.set_service_status(service, status).await;
    }
}

/// Ends every watch: one that goes on would keep its connection, and with it the server, open.
pub async fn end_watches(mut reporter: HealthReporter) {
    for service in SERVICES {
        reporter.clear_service_status(service).await;
    }
}

/// Reports as serving while `database` answers a sign of life; runs until dropped.
pub async fn follow<E>(database: impl AsyncFn() -> Result<(), E>, reporter: HealthReporter) {
    let mut serving = false;
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let answers = matches!(timeout(PERIOD * 2, database()).await, Ok(Ok(())));
        if answers != serving {
            serving = answers;
            report(&reporter, serving).await;
            if serving {
                info!("serving");
            } else {
                warn!("not serving: the database does not answer");
            }
        }
    }
}

/// Asks a server whether it serves, within `deadline`.
///
/// # Errors
/// Why it does not, for people.
pub async fn probe(address: &str, service: &str, deadline: Duration) -> Result<(), String> {
    let url = match address.contains("://") {
        true => address.to_owned(),
        false => format!("http://{address}"),
    };
    let endpoint = Endpoint::from_shared(url)
        .map_err(|_| format!("{address} is no address such as 127.0.0.1:50051"))?;
    let ask = async {
        let channel = endpoint
            .connect()
            .await
            .map_err(|_| format!("nothing answers at {address}"))?;
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        HealthClient::new(channel)
            .check(request)
            .await
            .map_err(|status| match status.code() {
                Code::NotFound => format!("the server has no service {service}"),
                _ => status.message().to_owned(),
            })
    };
    let answer = timeout(deadline, ask)
        .await
        .map_err(|_| "no answer in time".to_owned())??;
    match answer.into_inner().status() {
        health_check_response::ServingStatus::Serving => Ok(()),
        status => Err(status.as_str_name().to_owned()),
    }
}
