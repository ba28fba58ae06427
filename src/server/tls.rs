//! TLS of the listener, and who clients are by their certificates.

use std::{collections::HashMap, io, path::Path, sync::Arc};

use arc_swap::ArcSwap;
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, RootCertStore, ServerConfig, ServerConnection,
        crypto::{CryptoProvider, aws_lc_rs},
        pki_types::{
            CertificateDer, PrivateKeyDer,
            pem::{self, PemObject as _},
        },
        server::{NoClientAuth, VerifierBuilderError, WebPkiClientVerifier},
    },
    server::TlsStream,
};

use crate::{
    config::{TlsSettings, is_uri},
    model::ScopeSet,
};

/// Why TLS cannot be spoken.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("setting {setting}: cannot read PEM from {path}")]
    File {
        setting: &'static str,
        path: String,
        source: pem::Error,
    },
    #[error("setting tls.client_ca_file: nobody could be trusted by it")]
    ClientCa(#[source] VerifierBuilderError),
    #[error("settings tls.cert_file and tls.key_file do not go together")]
    Pair(#[source] rustls::Error),
    #[error("setting tls.clients: {0}")]
    Clients(String),
}

/// Speaks TLS. Cheap to clone; all clones follow [`Tls::reload`].
#[derive(Clone)]
pub struct Tls(Arc<ArcSwap<Spoken>>);

struct Spoken {
    acceptor: TlsAcceptor,
    identities: HashMap<String, Arc<ScopeSet>>,
}

impl Tls {
    /// Reads what the settings name; `None`: no TLS is wanted.
    ///
    /// # Errors
    /// The setting that cannot be used.
    pub fn load(settings: &TlsSettings) -> Result<Option<Self>, TlsError> {
        if !settings.is_set() {
            return Ok(None);
        }
        let spoken = Spoken::load(settings)?;
        Ok(Some(Self(Arc::new(ArcSwap::from_pointee(spoken)))))
    }

    /// Reads the files again, for connections from now on.
    ///
    /// # Errors
    /// Those of [`Tls::load`]; what was there stays in force.
    pub fn reload(&self, settings: &TlsSettings) -> Result<(), TlsError> {
        self.0.store(Arc::new(Spoken::load(settings)?));
        Ok(())
    }

    /// Shakes hands; tells what the client's certificate lets it do.
    pub(super) async fn accept(
        &self,
        stream: TcpStream,
    ) -> io::Result<(TlsStream<TcpStream>, Option<Arc<ScopeSet>>)> {
        let spoken = self.0.load_full();
        let stream = spoken.acceptor.accept(stream).await?;
        let scopes = spoken.scopes_of(stream.get_ref().1);
        Ok((stream, scopes))
    }
}

impl Spoken {
    fn load(settings: &TlsSettings) -> Result<Self, TlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let chain = certificates("tls.cert_file", &settings.cert_file)?;
        let key = PrivateKeyDer::from_pem_file(&settings.key_file)
            .map_err(unreadable("tls.key_file", &settings.key_file))?;
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Pair)?;
        let verifier = if settings.client_ca_file.as_os_str().is_empty() {
            Arc::new(NoClientAuth)
        } else {
            clients_of(&settings.client_ca_file, provider)?
        };
        let mut config = builder
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(TlsError::Pair)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let identities = settings.identities().map_err(TlsError::Clients)?;
        let identities = identities.into_iter();
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            identities: identities
                .map(|(identity, scopes)| (identity, Arc::new(scopes)))
                .collect(),
        })
    }

    /// By the first of the certificate's names that is known.
    fn scopes_of(&self, connection: &ServerConnection) -> Option<Arc<ScopeSet>> {
        let leaf = connection.peer_certificates()?.first()?;
        let leaf = webpki::EndEntityCert::try_from(leaf).ok()?;
        // What one kind of name says must not be taken for the other. Of URIs the case counts.
        let uris = leaf.valid_uri_names().filter(|name| is_uri(name));
        let hosts = leaf.valid_dns_names().filter(|name| !is_uri(name));
        let names = uris.map(str::to_owned);
        let mut names = names.chain(hosts.map(str::to_ascii_lowercase));
        names.find_map(|name| self.identities.get(&name)).cloned()
    }
}

/// Certificates of clients are looked at when they are shown. Most clients show a token instead.
fn clients_of(
    path: &Path,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates("tls.client_ca_file", path)?);
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .allow_unauthenticated()
        .build()
        .map_err(TlsError::ClientCa)
}

fn certificates(
    setting: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    read.map_err(unreadable(setting, path))
}

fn unreadable(setting: &'static str, path: &Path) -> impl FnOnce(pem::Error) -> TlsError {
    let path = path.display().to_string();
    move |source| TlsError::File {
        setting,
        path,
        source,
    }
}
