//! `cryptattach init`

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::{Global, output, paper};
use crate::{
    base::key::StoreName,
    config::IdentitySpec,
    verbs::{
        error::Error,
        init::{self, Request},
        leaf::Hands,
        setup::NewPlace,
    },
};

/// Set up a key store on this host: its place, its owner's key pair, its configuration
///
/// Every key is sealed to the owner and to an escrow recipient. The escrow's private key stays offline; it opens the
/// volumes if the owner's key is lost. An existing configuration gets the new store.
#[derive(Args)]
#[command(
    group = ArgGroup::new("rescue").required(true).multiple(true).args(["escrow", "no_escrow", "recovery"]),
    group = ArgGroup::new("place").required(true).args(["path", "tpm_nv"]),
    after_help = "Examples:
  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out /media/usb/escrow.key
  openssl pkey -in /media/usb/escrow.key -pubout -out /media/usb/escrow.pem
  cryptattach init --store cinder --path /mnt/keys/cinder --escrow /media/usb/escrow.pem
  cryptattach init --store disk --tpm-nv --escrow /media/usb/escrow.pem
  cryptattach init --store cinder --path /mnt/keys/cinder --recovery      words on paper in place of an escrow"
)]
pub struct Init {
    /// Name of the store, and of the container that its keys are bound to
    #[arg(long)]
    store: StoreName,
    /// The directory for the sealed keys, on another device than the volumes
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
    /// Keep the sealed keys in this machine's TPM, which has one disk's keys apart from its data
    #[arg(long)]
    tpm_nv: bool,
    /// Public key or X.509 certificate (PEM) for recovery; it is copied beside the configuration
    #[arg(long, value_name = "FILE")]
    escrow: Option<PathBuf>,
    /// Use no escrow: if the owner's key is lost, all data is lost
    #[arg(long, conflicts_with = "escrow")]
    no_escrow: bool,
    /// Make a recovery key, too: words for paper, shown once; they open the store's keys like an escrow's private key
    #[arg(long)]
    recovery: bool,
    /// The owner's public key or certificate (PEM) [default: a new P-256 key pair beside the configuration; with --tpm-nv
    /// this host's key in the TPM]
    #[arg(long, value_name = "FILE")]
    owner: Option<PathBuf>,
    /// The owner's private key on this host: FILE in PEM, or tpm:FILE
    #[arg(long, value_name = "FILE", requires = "owner")]
    identity: Option<IdentitySpec>,
}

impl Init {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let hands = paper::at_terminal(self.recovery)?;
        let request = Request {
            store: &self.store,
            place: self.path.as_deref().map_or(NewPlace::Tpm, NewPlace::Directory),
            escrow: self.escrow.as_deref(),
            owner: self.owner.as_deref(),
            identity: self.identity.as_ref(),
            recovery: hands.as_ref().map(|hands| hands as &dyn Hands),
        };
        let made = init::init(&global.config, &request)?;
        output::print(global.json, &made, || {
            let mut lines = vec![
                format!("store '{}' in {}", made.store, made.place),
                format!("  sealed to the owner   {}", made.owner.display()),
                match &made.escrow {
                    Some(escrow) => format!("  and to the escrow     {}", escrow.display()),
                    None => "  NOT sealed to any escrow".to_owned(),
                },
            ];
            lines.extend(made.recovery.iter().map(|leaf| format!("  and to the paper      leaf '{leaf}'")));
            lines.extend(made.identity.iter().map(|key| format!("  opened by             {key}")));
            lines.push(format!("  configured in         {}", global.config.display()));
            lines
        })
    }
}
