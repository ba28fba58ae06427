use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    },
};
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

/// The name that servers have in their certificates.
pub(crate) const SERVER_NAME: &str = "tollkeeper.internal";

/// Signs certificates and keeps them in a folder of its own.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: tempfile::TempDir,
    pub(crate) ca: PathBuf,
}

/// A certificate and its key, as PEM.
#[derive(Clone)]
pub(crate) struct Pair {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        // Another name than those it signs: else they look signed by themselves.
        let name = &mut params.distinguished_name;
        name.push(DnType::CommonName, "an authority of the tests");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("signed");
        let ca = folder.path().join("ca.pem");
        std::fs::write(&ca, certificate.pem()).expect("written");
        Self {
            issuer: Issuer::new(params, key),
            folder,
            ca,
        }
    }

    pub(crate) fn server(&self) -> Pair {
        let name = SanType::DnsName(SERVER_NAME.try_into().expect("ASCII"));
        self.sign("server", name, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// A server's that stands on this machine.
    pub(crate) fn local_server(&self) -> Pair {
        let name = SanType::DnsName("localhost".try_into().expect("ASCII"));
        self.sign("server", name, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// A client's whose name is this URI.
    pub(crate) fn uri(&self, uri: &str) -> Pair {
        let name = SanType::URI(uri.try_into().expect("ASCII"));
        self.sign("uri", name, ExtendedKeyUsagePurpose::ClientAuth)
    }

    /// A client's whose name is this one.
    pub(crate) fn dns(&self, name: &str) -> Pair {
        let name = SanType::DnsName(name.try_into().expect("ASCII"));
        self.sign("dns", name, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn sign(&self, kind: &str, name: SanType, purpose: ExtendedKeyUsagePurpose) -> Pair {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![name];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let file = |extension| {
            let name = format!("{kind}-{}.{extension}", uuid::Uuid::now_v7());
            self.folder.path().join(name)
        };
        let pair = Pair {
            certificate: file("pem"),
            key: file("key"),
        };
        std::fs::write(&pair.certificate, certificate.pem()).expect("written");
        std::fs::write(&pair.key, key.serialize_pem()).expect("written");
        pair
    }

    /// A connection, made on first use, of a client that trusts this authority and shows a
    /// certificate, if any.
    pub(crate) fn channel(&self, address: SocketAddr, shows: Option<&Pair>) -> Channel {
        let config = client_config(&self.ca, shows);
        let connector = service_fn(move |_: Uri| {
            let connector = TlsConnector::from(config.clone());
            async move {
                let stream = TcpStream::connect(address).await?;
                let name = ServerName::try_from(SERVER_NAME).expect("a name");
                let stream = connector.connect(name, stream).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        Endpoint::from_shared(format!("http://{address}"))
            .expect("an address")
            .connect_with_connector_lazy(connector)
    }
}

fn client_config(ca: &Path, shows: Option<&Pair>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(ca).expect("PEM"))
        .expect("a root");
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("a version")
        .with_root_certificates(roots);
    let mut config = match shows {
        None => config.with_no_client_auth(),
        Some(pair) => config
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(&pair.certificate).expect("PEM")],
                PrivateKeyDer::from_pem_file(&pair.key).expect("PEM"),
            )
            .expect("a pair"),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}
