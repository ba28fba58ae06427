//! `serve`: the service, from the first line to the last.

use std::path::Path;

use anyhow::Context as _;
use chrono::Utc;
use tokio::signal::unix::{Signal, SignalKind};
use tracing::{error, info, warn};

use super::{
    database::Database,
    secrets,
    signals::{Signals, caught},
    write_private,
};
use crate::{
    auth::{Auth, InitialCredential, NewAccount, random_alphanumeric},
    config::{Loaded, Settings},
    error::Error,
    model::{Origin, Person, Role, Scope},
    server::{Server, Tls},
    telemetry,
    usage::{Usage, load_tiers},
};

const ADMIN_EMAIL: &str = "admin@tollkeeper.local";
/// 142 bits.
pub(super) const PASSWORD_CHARS: usize = 24;

const FIRST_RUN_FILE: &str = "first-run.txt";

/// Runs the service until SIGTERM or SIGINT.
pub(super) async fn serve(loaded: Loaded) -> anyhow::Result<()> {
    loaded.check_secrets()?;
    let mut settings = loaded.settings;
    telemetry::init(&settings.log, settings.dev).map_err(anyhow::Error::msg)?;
    let mut signals = Signals::new()?;
    // From the first moment on too: uncaught, it would end the start.
    let hangups = caught(SignalKind::hangup())?;
    let is_private = !settings.database.url.is_set();
    let started = tokio::select! {
        started = start(&mut settings, is_private) => started?,
        // Dropping the start stops a Postgres that is on its way up.
        () = signals.received() => return Ok(()),
    };
    let (server, database) = started;
    let address = server.local_addr().context("the listener has no address")?;
    let ops = server.ops_addr().map(|ops| ops.to_string());
    info!(%address, ops, dev = settings.dev, "listening");
    let (auth, usage) = (server.auth().clone(), server.usage().clone());
    let tls = server.tls().cloned();
    let reload = tokio::spawn(reload_on_hangup(hangups, settings, auth, usage, tls));
    let ended = server.run(signals.received()).await;
    reload.abort();
    database.close().await?;
    Ok(ended?)
}

async fn start(settings: &mut Settings, is_private: bool) -> anyhow::Result<(Server, Database)> {
    let database = Database::own(settings).await?;
    settings.database = database.settings.clone();
    let (keys, master_key) = secrets::load(settings)?;
    if settings.dev && !settings.mail.is_configured() {
        settings.mail.directory = settings.data_dir.join("mail");
        let folder = settings.mail.directory.display();
        info!(%folder, "mails are written to files (setting mail.server)");
    }
    let server = Server::bind(settings, keys, &master_key).await?;
    if is_private && !server.store().user_any_admin().await? {
        let address = server.local_addr().context("the listener has no address")?;
        introduce(&server, &settings.data_dir, &address.to_string()).await?;
    }
    Ok((server, database))
}

/// Makes an administrator and a service account, prints both once, and says what to try.
///
/// The administrator comes last: while there is none, the next start begins anew, so a kill in
/// between leaves nobody without the password.
async fn introduce(server: &Server, data_dir: &Path, address: &str) -> anyhow::Result<()> {
    let origin = Origin::operator();
    let password = random_alphanumeric(PASSWORD_CHARS)?;
    let tag = password[..6].to_ascii_lowercase();
    let scopes = [
        Scope::TokensValidate,
        Scope::UsageWrite,
        Scope::UsageRead,
        Scope::Quota,
    ];
    let (_, key) = server
        .auth()
        .create_service_account(
            format!("first-{tag}").parse().map_err(anyhow::Error::msg)?,
            scopes.into_iter().collect(),
            &origin,
        )
        .await?;
    let path = data_dir.join(FIRST_RUN_FILE);
    let text = format!("admin_email={ADMIN_EMAIL}\nadmin_password={password}\nservice_key={key}\n");
    write_private(&path, &text)?;
    let admin = NewAccount {
        person: Person {
            email: ADMIN_EMAIL.parse().map_err(anyhow::Error::msg)?,
            username: "admin".parse().map_err(anyhow::Error::msg)?,
            full_name: "Administrator".parse().map_err(anyhow::Error::msg)?,
        },
        credential: InitialCredential::Password(password.clone()),
        role: Role::Admin,
        tier: server.usage().tiers().default_tier().name.clone(),
    };
    match server.auth().create_account(admin, &origin).await {
        Ok(_) => {}
        Err(Error::AccountExists) => {
            info!("no administrator: make one with `tollkeeper users create --admin`");
            std::fs::remove_file(&path)
                .with_context(|| format!("cannot remove {}", path.display()))?;
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    }
    println!(
        "\n\
         Tollkeeper is up for the first time, on its own Postgres in {folder}.\n\
         \n\
         \x20 admin login   {ADMIN_EMAIL}\n\
         \x20 password      {password}\n\
         \x20 service key   {key}\n\
         \n\
         They are shown this once; {file} keeps them until you delete it.\n\
         \n\
         Try next:\n\
         \x20 grpcurl -plaintext {address} list\n\
         \x20 grpcurl -plaintext -d '{{\"identifier\": \"admin\", \"password\": \"{password}\"}}' \\\n\
         \x20   {address} tollkeeper.auth.v1.AuthService/Login\n\
         \x20 grpcurl -plaintext -H 'authorization: Bearer {key}' \\\n\
         \x20   {address} tollkeeper.usage.v1.UsageService/ListTiers\n",
        folder = data_dir.display(),
        file = path.display(),
    );
    Ok(())
}

/// Reads the signing keys, the tiers and the certificates again at every SIGHUP. Should some not be
/// usable, the old ones stay.
async fn reload_on_hangup(
    mut hangups: Signal,
    settings: Settings,
    auth: Auth,
    usage: Usage,
    tls: Option<Tls>,
) {
    while hangups.recv().await.is_some() {
        match secrets::reload_keys(&settings) {
            Ok(Some(keys)) => {
                auth.replace_keys(keys);
                info!("read the signing keys again");
            }
            Ok(None) => {}
            Err(error) => error!(error = format!("{error:#}"), "the old signing keys stay"),
        }
        match reload_tiers(&settings, &usage).await {
            Ok(()) => info!("read the tiers again"),
            Err(error) => error!(error = format!("{error:#}"), "the old tiers stay"),
        }
        match tls.as_ref().map(|tls| tls.reload(&settings.tls)) {
            None => {}
            Some(Ok(())) => info!("read the certificates again"),
            Some(Err(error)) => error!(
                error = format!("{:#}", anyhow::Error::from(error)),
                "the old certificates stay"
            ),
        }
    }
}

async fn reload_tiers(settings: &Settings, usage: &Usage) -> anyhow::Result<()> {
    let tiers = load_tiers(&settings.usage.tiers_file)?;
    usage.replace_tiers(tiers).await?;
    if let Err(error) = usage.settle(Utc::now()).await {
        warn!(%error, "not every user's month is settled under the new tiers, upkeep will try again");
    }
    Ok(())
}
